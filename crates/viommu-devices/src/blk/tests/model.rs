//! Random requests, in random pieces, against a naive model: a vector of bytes. Pages vanish in between.

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::recording::Op;
use super::*;
use crate::testing::{PAGE, Piece};

const SECTORS: u64 = 24;

fn small(number: impl TryInto<usize>) -> usize {
    number.try_into().ok().expect("small")
}

/// What a driver asks for.
#[derive(Clone, Debug)]
struct Ask {
    kind: u32,
    sector: u64,
    /// Behind the header.
    sent: Vec<u8>,
    /// Before the status; no status without a room.
    room: Option<usize>,
    cuts: Vec<usize>,
    indirect: bool,
    /// Which piece's page vanishes, and before which look at memory.
    vanish: Option<(usize, usize)>,
}

fn sectors() -> impl Strategy<Value = u64> {
    prop_oneof![12 => 0..SECTORS + 2, 1 => Just(u64::MAX), 1 => Just(1 << 55), 1 => any::<u64>()]
}

fn segments() -> impl Strategy<Value = Vec<u8>> {
    let flags = prop_oneof![6 => Just(0), 4 => Just(1), 1 => any::<u32>()];
    let count = prop_oneof![9 => 0..5_u32, 1 => any::<u32>()];
    vec((sectors(), count, flags).prop_map(|(sector, count, flags)| segment(sector, count, flags)), 0..4)
        .prop_map(|segments| segments.concat())
}

fn data() -> impl Strategy<Value = Vec<u8>> {
    let len = prop_oneof![9 => (0..5_usize).prop_map(|sectors| sectors * 512), 1 => 0..600_usize];
    (len, any::<u8>()).prop_map(|(len, seed)| (0..len).map(|at| (at / 7).to_le_bytes()[0] ^ seed).collect())
}

fn ask() -> impl Strategy<Value = Ask> {
    let room = || {
        let len = prop_oneof![9 => (0..5_usize).prop_map(|sectors| sectors * 512), 1 => 0..600_usize];
        prop_oneof![19 => len.prop_map(Some), 1 => Just(None)]
    };
    let nothing = || Just(Vec::new());
    let empty = || Just(Some(0_usize));
    let shape = prop_oneof![
        4 => (Just(kind::IN), nothing().boxed(), room().boxed()),
        4 => (Just(kind::OUT), data().boxed(), empty().boxed()),
        1 => (Just(kind::FLUSH), nothing().boxed(), empty().boxed()),
        1 => (Just(kind::GET_ID), nothing().boxed(), (18..24_usize).prop_map(Some).boxed()),
        2 => (Just(kind::DISCARD), segments().boxed(), empty().boxed()),
        2 => (Just(kind::WRITE_ZEROES), segments().boxed(), empty().boxed()),
        1 => (0..20_u32, data().boxed(), room().boxed()),
    ];
    let vanish = prop_oneof![Just(None), (0..20_usize, 0..3_usize).prop_map(Some)];
    (shape, sectors(), vec(0..2500_usize, 0..4), any::<bool>(), vanish).prop_map(
        |((kind, sent, room), sector, cuts, indirect, vanish)| Ask {
            kind,
            sector,
            sent,
            room,
            cuts,
            indirect,
            vanish,
        },
    )
}

/// What is left of a request's memory: at the look that takes it, and at the one that answers.
struct Seen {
    table: bool,
    header: bool,
    sent: bool,
    room: bool,
    status: bool,
}

const ALL: Seen = Seen { table: true, header: true, sent: true, room: true, status: true };

struct Model {
    bytes: Vec<u8>,
    features: u64,
}

/// Status, data and used length; none where it is not given back.
type Answer = Option<(u8, Option<Vec<u8>>, u32)>;

impl Model {
    /// What it does to the disk, and its status.
    fn execute(&mut self, ask: &Ask, room: usize, seen: &Seen) -> (u8, Option<Vec<u8>>) {
        if !seen.header {
            return (IOERR, None);
        }
        let on_disk = |sector: u64, bytes: u64| {
            u128::from(sector) * 512 + u128::from(bytes) <= u128::from(SECTORS) * 512
        };
        let sent = ask.sent.len();
        let place = |sector: u64| small(sector) * 512;
        match ask.kind {
            kind::IN => {
                if sent > 0 || !room.is_multiple_of(512) || !on_disk(ask.sector, room as u64) || !seen.room {
                    return (IOERR, None);
                }
                let at = place(ask.sector);
                (OK, Some(self.bytes[at..at + room].to_vec()))
            }
            kind::OUT => {
                let fits = sent.is_multiple_of(512) && on_disk(ask.sector, sent as u64);
                if room > 0 || !fits || !seen.sent {
                    return (IOERR, None);
                }
                let at = place(ask.sector);
                self.bytes[at..at + sent].copy_from_slice(&ask.sent);
                (OK, None)
            }
            kind::FLUSH => (OK, None),
            kind::GET_ID => {
                let id = b"model\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
                if room < 20 || !seen.room { (IOERR, None) } else { (OK, Some(id)) }
            }
            kind::DISCARD | kind::WRITE_ZEROES => self.zero(ask, room, seen),
            _ => (UNSUPP, None),
        }
    }

    fn zero(&mut self, ask: &Ask, room: usize, seen: &Seen) -> (u8, Option<Vec<u8>>) {
        let discard = ask.kind == kind::DISCARD;
        let bit = if discard { feature::DISCARD } else { feature::WRITE_ZEROES };
        if self.features & bit == 0 {
            return (UNSUPP, None);
        }
        let sent = ask.sent.len();
        let most = if discard { 32 } else { 1 };
        if room > 0 || sent == 0 || !sent.is_multiple_of(16) || sent / 16 > most || !seen.sent {
            return (IOERR, None);
        }
        let mut ranges = Vec::new();
        for segment in ask.sent.chunks(16) {
            let sector = u64::from_le_bytes(segment[..8].try_into().unwrap());
            let count = u32::from_le_bytes(segment[8..12].try_into().unwrap());
            let flags = u32::from_le_bytes(segment[12..].try_into().unwrap());
            if flags > 1 || discard && flags == 1 {
                return (UNSUPP, None);
            }
            if u128::from(sector) + u128::from(count) > u128::from(SECTORS) {
                return (IOERR, None);
            }
            ranges.push((small(sector) * 512, small(count) * 512));
        }
        for (at, len) in ranges {
            self.bytes[at..at + len].fill(0);
        }
        (OK, None)
    }

    fn answer(&mut self, ask: &Ask, seen: &Seen) -> Answer {
        let room = ask.room.filter(|_| seen.table)?;
        let (status, data) = self.execute(ask, room, seen);
        if !seen.status {
            return None;
        }
        let written = data.as_ref().map_or(0, Vec::len);
        let used = if written == room { written + 1 } else { written };
        Some((status, data, u32::try_from(used).unwrap()))
    }
}

fn rig() -> (Rig, Model) {
    let options = BlkOptions { id: "model".to_owned(), ..BlkOptions::default() };
    let rig = Rig::with(small(SECTORS) * 512, 1 << 20, &options);
    rig.disk.fill(|at| (at / 100).to_le_bytes()[0]);
    let model = Model { bytes: rig.disk.bytes(), features: rig.features };
    (rig, model)
}

impl Ask {
    fn offer(&self, driver: &mut Driver) -> Request {
        let room = self.room.map_or(0, |room| room + 1);
        driver.request(&request(self.kind, self.sector, &self.sent), room, &self.cuts, self.indirect)
    }

    /// `used` has what was given back, in order.
    fn check(
        &self,
        rig: &Rig,
        request: &Request,
        used: &mut impl Iterator<Item = (u32, u32)>,
        expected: &Answer,
    ) {
        let written = rig.driver.answer(request);
        match expected {
            None => assert!(written.last().is_none_or(|status| *status == UNTOUCHED), "{self:?}"),
            Some((status, data, len)) => {
                assert_eq!(used.next(), Some((u32::from(request.head), *len)), "{self:?}");
                assert_eq!(written.last(), Some(status), "{self:?}");
                if let Some(data) = data {
                    assert_eq!(&written[..data.len()], data, "{self:?}");
                }
            }
        }
    }

    /// Lets a page vanish, and says what the device finds then.
    fn vanish(&self, driver: &Driver, request: &Request) -> Seen {
        let Some((index, after)) = self.vanish else { return ALL };
        let gone = request.pieces[index % request.pieces.len()];
        let page = (gone.at + u64::from(gone.len) / 2) / PAGE;
        driver.space.vanish(page * PAGE, after);
        // The page on which `[skip, skip + len)` of some pieces lies is gone at that look.
        let lost = |look: usize, pieces: &[Piece], skip: usize, len: usize| {
            let bytes = pieces.iter().flat_map(|piece| piece.at..piece.at + u64::from(piece.len));
            after <= look && bytes.skip(skip).take(len).any(|at| at / PAGE == page)
        };
        let of = |write| -> Vec<Piece> {
            request.pieces.iter().copied().filter(|piece| piece.write == write).collect()
        };
        let (readable, writable) = (of(false), of(true));
        let room = self.room.unwrap_or(0);
        // The table was placed behind the pieces.
        let table = request.pieces.last().unwrap();
        let table = (table.at + u64::from(table.len) + 3).next_multiple_of(16);
        let table = Piece { at: table, len: 16 * u32::try_from(request.pieces.len()).unwrap(), write: false };
        let delivered = if self.kind == kind::GET_ID { 20 } else { room };
        Seen {
            table: !(self.indirect && lost(0, &[table], 0, usize::MAX)),
            header: !lost(0, &readable, 0, 16),
            sent: !lost(0, &readable, 16, usize::MAX),
            room: !lost(1, &writable, 0, delivered),
            status: !lost(1, &writable, room, 1),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn requests_when_kicked_together_do_what_the_model_does(
        kicks in vec(vec(ask(), 1..8), 1..6),
        through in any::<bool>(),
        zeroes in any::<bool>(),
        holes in any::<bool>(),
    ) {
        let (mut rig, mut model) = rig();
        rig.features &= !if through { feature::FLUSH } else { 0 };
        rig.features &= !if zeroes { 0 } else { feature::WRITE_ZEROES };
        model.features = rig.features;
        if !holes {
            rig.disk.judge(|op| match op {
                Op::Punch(..) | Op::Zero(..) => Err(std::io::ErrorKind::Unsupported.into()),
                _ => Ok(()),
            });
            // A discard does nothing then.
            rig.features &= !feature::DISCARD;
            model.features = rig.features;
        }
        for asks in kicks {
            let requests: Vec<Request> = asks.iter().map(|ask| ask.offer(&mut rig.driver)).collect();
            let mut used = rig.run().into_iter();
            for (ask, request) in asks.iter().zip(&requests) {
                let expected = model.answer(ask, &ALL);
                ask.check(&rig, request, &mut used, &expected);
            }
            prop_assert_eq!(used.next(), None);
            prop_assert!(rig.disk.bytes() == model.bytes, "the disks differ");
            if through {
                prop_assert!(rig.disk.safe() == model.bytes, "not all is safe");
            }
            rig.driver.free();
        }
    }

    #[test]
    fn requests_when_pages_vanish_do_what_the_model_does(asks in vec(ask(), 1..40)) {
        let (mut rig, mut model) = rig();
        for ask in asks {
            let request = ask.offer(&mut rig.driver);
            let seen = ask.vanish(&rig.driver, &request);
            let mut used = rig.run().into_iter();
            let expected = model.answer(&ask, &seen);
            ask.check(&rig, &request, &mut used, &expected);
            prop_assert_eq!(used.next(), None);
            prop_assert!(rig.disk.bytes() == model.bytes, "the disks differ");
            rig.driver.space.restore();
            rig.driver.free();
        }
    }
}
