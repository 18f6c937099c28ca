//! The goals: what is measured for each, and what is asked of it. docs/bench.md says what they mean.

use anyhow::Context as _;

use crate::cells::Cells;
use crate::load::Effort;
use crate::row::{Limit, Pick, Row, Rule, Value};
use crate::work::ring::{BATCHES, MIRRORS};
use crate::work::{Who, Work};

use Limit::{AtLeast, AtMost};
use Who::{Crosvm, List, Qemu, Radix, Rangemap, VmMemory};

/// All who keep a table, as columns.
pub(crate) const TABLES: [Who; 5] = [VmMemory, Rangemap, Crosvm, Qemu, Radix];
/// Those of them that two threads can use at a time.
const LOCKED: [Who; 3] = [VmMemory, Crosvm, Qemu];
/// Those that can be iterated.
const ITERABLE: [Who; 3] = [Rangemap, Crosvm, Qemu];

type Rows = anyhow::Result<Vec<Row>>;
type Factors = &'static [(Who, f64)];

/// A goal, and how to come by its lines.
pub(crate) struct Goal {
    pub(crate) name: &'static str,
    /// Figures that it needs of works that have several.
    pub(crate) needs: &'static [(Work, &'static str)],
    pub(crate) rows: fn(&mut Run) -> Rows,
}

/// What the goals are measured with.
pub(crate) struct Run {
    pub(crate) effort: Effort,
    pub(crate) cells: Cells,
}

pub(crate) const GOALS: [Goal; 22] = [
    Goal { name: "G1", needs: &[(Work::Small, "translate")], rows: g1 },
    Goal { name: "G2", needs: &[(Work::Big, "translate")], rows: g2 },
    Goal { name: "G3", needs: &[(Work::Small, "pair")], rows: g3 },
    Goal { name: "G4", needs: &[(Work::Small, "pair"), (Work::Big, "pair")], rows: g4 },
    Goal { name: "G5", needs: &[(Work::Big, "bulk")], rows: g5 },
    Goal { name: "G6", needs: &[(Work::Small, "replay"), (Work::Big, "replay")], rows: g6 },
    Goal { name: "G7", needs: &[], rows: g7 },
    Goal { name: "G8", needs: &[(Work::Big, "memory")], rows: g8 },
    Goal { name: "G9", needs: &[], rows: g9 },
    Goal { name: "G10", needs: &[], rows: g10 },
    Goal { name: "G11", needs: &[], rows: g11 },
    Goal { name: "G12", needs: &[], rows: g12 },
    Goal { name: "G13", needs: &[], rows: g13 },
    Goal { name: "G14", needs: &[], rows: g14 },
    Goal { name: "G15", needs: &[], rows: g15 },
    Goal { name: "G16", needs: &[], rows: g16 },
    Goal { name: "G17", needs: &[], rows: g17 },
    Goal { name: "V1", needs: &[], rows: v1 },
    Goal { name: "C1", needs: &[], rows: c1 },
    Goal { name: "C2", needs: &[], rows: c2 },
    Goal { name: "I1", needs: &[], rows: i1 },
    Goal { name: "none", needs: &[], rows: busy },
];

impl Run {
    fn ours(&mut self, work: Work, figure: &str, pick: Pick) -> anyhow::Result<Value> {
        let figures = self.cells.ours(work)?;
        pick.figure(figures, figure).with_context(|| format!("{work:?} gives no {figure}"))
    }

    /// A figure of one thread beside peers.
    fn row(
        &mut self,
        (goal, what): (&'static str, String),
        (work, figure): (Work, &str),
        (unit, limit): (&'static str, Limit),
        peers: &[Who],
    ) -> anyhow::Result<Row> {
        let ours = self.ours(work, figure, Pick::Min)?;
        let row = Row::new(goal, what, unit, limit, ours);
        Ok(row.beside(&mut self.cells, work, figure, Pick::Min, peers))
    }

    fn small(&self) -> String {
        live(self.effort.small())
    }

    fn big(&self) -> String {
        live(self.effort.big())
    }
}

fn live(count: u64) -> String {
    match count {
        1_048_576.. => format!("{}M", count >> 20),
        _ if count >= 1024 => format!("{}k", count >> 10),
        _ => count.to_string(),
    }
}

fn g1(run: &mut Run) -> Rows {
    let what = format!("translate, {} live, random", run.small());
    let row = run.row(("G1", what), (Work::Small, "translate"), ("ns", AtMost(10.0)), &TABLES)?;
    let factors = [(Crosvm, 12.0), (Qemu, 25.0), (VmMemory, 25.0), (Radix, 1.0 / 3.6)];
    Ok(vec![row.wants(Rule::Factors, &factors).done()])
}

fn g2(run: &mut Run) -> Rows {
    let what = format!("translate, {} live, random", run.big());
    let row = run.row(("G2", what), (Work::Big, "translate"), ("ns", AtMost(20.0)), &TABLES)?;
    let factors = [(Crosvm, 25.0), (Qemu, 60.0), (VmMemory, 30.0), (Radix, 1.0 / 3.0)];
    Ok(vec![row.wants(Rule::Factors, &factors).done()])
}

fn g3(run: &mut Run) -> Rows {
    let what = format!("map + unmap, {} live", run.small());
    let row = run.row(("G3", what), (Work::Small, "pair"), ("ns", AtMost(55.0)), &TABLES)?;
    let factors = [(Crosvm, 6.0), (Qemu, 16.0), (VmMemory, 10.0)];
    Ok(vec![row.wants(Rule::Factors, &factors).done()])
}

fn g4(run: &mut Run) -> Rows {
    let what = format!("growth of the pair from {} to {} live", run.small(), run.big());
    let small = run.ours(Work::Small, "pair", Pick::Min)?;
    let big = run.ours(Work::Big, "pair", Pick::Min)?;
    let ours = Value { value: big.value / small.value, noise: small.noise + big.noise };
    let mut row = Row::new("G4", what, "x", AtMost(1.5), ours);
    for who in TABLES {
        let mut pair = |work| {
            let figures = run.cells.peer(work, who)?;
            Pick::Min.figure(figures, "pair").map(|value| value.value)
        };
        let growth = pair(Work::Big).zip(pair(Work::Small)).map(|(big, small)| big / small);
        row = row.peer(who, growth);
    }
    Ok(vec![row.done()])
}

fn g5(run: &mut Run) -> Rows {
    let what = format!("unmap of {} pages in one call, a mapping", run.big());
    let row = run.row(("G5", what), (Work::Big, "bulk"), ("ns", AtMost(3.0)), &TABLES)?;
    Ok(vec![row.wants(Rule::Factors, &[(Crosvm, 38.0), (Qemu, 80.0)]).done()])
}

fn g6(run: &mut Run) -> Rows {
    let what = format!("replay, {} live, a mapping", run.small());
    let small = run.row(("G6", what), (Work::Small, "replay"), ("ns", AtMost(5.0)), &ITERABLE)?;
    let what = format!("replay, {} live, a mapping", run.big());
    let big = run.row(("G6", what), (Work::Big, "replay"), ("ns", AtMost(5.0)), &ITERABLE)?;
    let big = big.wants(Rule::Factors, &[(Crosvm, 6.0), (Qemu, 40.0)]);
    let what = "replay of an empty space of 2^64 bytes".to_owned();
    let empty = run.row(("G6", what), (Work::EmptyReplay, "subscribe"), ("ns", AtMost(1000.0)), &[])?;
    Ok(vec![small.done(), big.done(), empty.done()])
}

fn g7(run: &mut Run) -> Rows {
    let lines: [(&str, &str, &'static str, Limit, bool); 7] = [
        ("reads beside a churner whose unmaps each wait", "single reads", "M/s", AtLeast(40.0), true),
        ("pairs of that churner", "single pairs", "M/s", AtLeast(1.5), true),
        ("its unmap + wait, p50", "single wait p50", "ns", AtMost(600.0), false),
        ("its unmap + wait, p99.9", "single wait p99.9", "ns", AtMost(2000.0), false),
        ("a lookup beside it, p99.9, clock included", "lookup p99.9", "ns", AtMost(500.0), true),
        ("reads beside a churner, 16 unmaps a wait", "burst reads", "M/s", AtLeast(40.0), false),
        ("pairs of that churner", "burst pairs", "M/s", AtLeast(4.0), false),
    ];
    let mut rows = Vec::new();
    for (what, figure, unit, limit, beside) in lines {
        let ours = run.ours(Work::Contended, figure, Pick::Median)?;
        let row = Row::new("G7", what, unit, limit, ours);
        let peers: &[Who] = if beside { &LOCKED } else { &[] };
        rows.push(row.beside(&mut run.cells, Work::Contended, figure, Pick::Median, peers).done());
    }
    Ok(rows)
}

fn g8(run: &mut Run) -> Rows {
    let what = format!("memory, {} adjacent pages, a mapping", run.big());
    let row = run.row(("G8", what), (Work::Big, "memory"), ("B", AtMost(12.0)), &TABLES)?;
    Ok(vec![row.wants(Rule::Both, &[(Crosvm, 5.6), (Qemu, 10.0)]).done()])
}

fn g9(run: &mut Run) -> Rows {
    let lines: [(&str, Work, f64, Factors); 5] = [
        ("memory, a page in each 2 MiB, a mapping", Work::Every2m, 80.0, &[(Qemu, 1.0), (Radix, 50.0)]),
        (
            "memory, a page in each 1 GiB, a mapping",
            Work::Every1g,
            160.0,
            &[(Qemu, 1.0 / 1.3), (Radix, 50.0)],
        ),
        ("memory, a page in each 256 KiB, a mapping", Work::Every256k, 200.0, &[]),
        ("memory, a page in each 128 MiB, a mapping", Work::Every128m, 200.0, &[]),
        ("memory, 8 mapped, 7 unmapped in each 2 MiB", Work::OneOfEight, 200.0, &[]),
    ];
    let mut rows = Vec::new();
    for (what, work, limit, factors) in lines {
        let row = run.row(("G9", what.to_owned()), (work, "memory"), ("B", AtMost(limit)), &TABLES)?;
        rows.push(row.wants(Rule::Both, factors).done());
    }
    Ok(rows)
}

fn g10(run: &mut Run) -> Rows {
    let what = "translate, 64 mappings of 1 GiB, random".to_owned();
    // The plain radix has no large leaves.
    let peers = &TABLES[..4];
    let row = run.row(("G10", what), (Work::Huge, "translate"), ("ns", AtMost(6.0)), peers)?;
    Ok(vec![row.wants(Rule::Factors, &[(Crosvm, 7.0), (Qemu, 7.0)]).done()])
}

/// What consumers add to an event, of which a pair has two.
fn added(run: &mut Run, with: &str, without: &str, consumers: f64) -> anyhow::Result<Value> {
    let with = run.ours(Work::Dispatch, with, Pick::Min)?;
    let without = run.ours(Work::Dispatch, without, Pick::Min)?;
    let value = (with.value - without.value) / 2.0 / consumers;
    let spread = (with.value * with.noise + without.value * without.noise) / 2.0 / consumers;
    Ok(Value { value, noise: if value > 0.0 { spread / value } else { 0.0 } })
}

fn g11(run: &mut Run) -> Rows {
    let mut rows = Vec::new();
    for (count, limit) in [("1", 6.3), ("4", 10.2), ("16", 28.2)] {
        let ours = added(run, count, "0", 1.0)?;
        let what = format!("an event to {count} no-op mirrors");
        let row = Row::new("G11", what, "ns", AtMost(limit), ours);
        let row = row.beside(&mut run.cells, Work::Dispatch, count, Pick::Min, &[List]);
        rows.push(row.wants(Rule::Factors, &[(List, 1.0 / 0.8)]).done());
    }
    for (what, with, without, consumers) in [
        ("a consumer of another window, beside one that hears", "1 and 16 elsewhere", "1", 16.0),
        ("a consumer of another kind, beside one that hears", "1 and 16 otherwise", "1", 16.0),
        ("a consumer of another window, of 16 alone", "0 and 16 elsewhere", "0", 16.0),
        ("a consumer of another window, quite alone", "0 and 1 elsewhere", "0", 1.0),
    ] {
        let ours = added(run, with, without, consumers)?;
        rows.push(Row::new("G11", what, "ns", AtMost(1.0), ours).done());
    }
    Ok(rows)
}

fn g12(run: &mut Run) -> Rows {
    let mut rows = Vec::new();
    for readers in ["1", "16", "64"] {
        let ours = run.ours(Work::IdleReaders, readers, Pick::Min)?;
        let what = format!("map + unmap that waits, {readers} idle readers");
        rows.push(Row::new("G12", what, "ns", AtMost(100.0), ours).done());
    }
    Ok(rows)
}

fn g13(run: &mut Run) -> Rows {
    let what = "guard, enter and exit".to_owned();
    let row = run.row(("G13", what), (Work::Guard, "guard"), ("ns", AtMost(15.0)), &[])?;
    Ok(vec![row.done()])
}

fn g14(run: &mut Run) -> Rows {
    let what = "pair at fresh random addresses in 2^47, 1000 live".to_owned();
    let pair = run.row(("G14", what), (Work::Fresh, "pair"), ("ns", AtMost(300.0)), &[])?;
    let what = format!("memory grown over {} M such pairs", run.effort.fresh_pairs() as f64 / 1e6);
    // A few pages that free memory had not touched before are no growth.
    let growth = run.row(("G14", what), (Work::Fresh, "growth"), ("KiB", AtMost(64.0)), &[])?;
    Ok(vec![pair.done(), growth.done()])
}

fn g15(run: &mut Run) -> Rows {
    let what = "an empty domain, memory".to_owned();
    let memory = run.row(("G15", what), (Work::Empty, "memory"), ("KiB", AtMost(32.0)), &[])?;
    let what = "an empty domain, time to make".to_owned();
    let time = run.row(("G15", what), (Work::Empty, "time"), ("us", AtMost(20.0)), &[])?;
    Ok(vec![memory.done(), time.done()])
}

fn g16(run: &mut Run) -> Rows {
    let what = "map on untouched memory, p99.99, clock included".to_owned();
    let row = run.row(("G16", what), (Work::Cold, "p99.99"), ("us", AtMost(10.0)), &[])?;
    Ok(vec![row.done()])
}

fn g17(run: &mut Run) -> Rows {
    let what = format!("ATTACH with a mirror to {} mappings, less its calls, a mapping", run.small());
    let row = run.row(("G17", what), (Work::Attach, "attach"), ("ns", AtMost(20.0)), &[])?;
    Ok(vec![row.done()])
}

/// An event on its way to a consumer's host: what is left when the host's own call costs nothing.
fn c1(run: &mut Run) -> Rows {
    let mut rows = Vec::new();
    for (work, name) in
        [(Work::Type1, "type1 mirror"), (Work::Iommufd, "iommufd binding"), (Work::Vdpa, "vhost-vDPA mirror")]
    {
        let pair = run.ours(work, "pair", Pick::Min)?;
        let event = Value { value: pair.value / 2.0, noise: pair.noise };
        let what = format!("an event through the {name}, less its call");
        rows.push(Row::new("C1", what, "ns", AtMost(200.0), event).done());
        let what = format!("a mapping replayed into the {name}, less its call");
        let replay = run.row(("C1", what), (work, "replay"), ("ns", AtMost(200.0)), &[])?;
        rows.push(replay.done());
    }
    Ok(rows)
}

/// What a vhost device misses and is told is gone, less its calls.
fn c2(run: &mut Run) -> Rows {
    let what = "an answer to a miss of a full vhost device, less its calls".to_owned();
    let answer = run.row(("C2", what), (Work::Vhost, "answer"), ("ns", AtMost(1000.0)), &[])?;
    let unheard = run.ours(Work::Vhost, "unheard", Pick::Min)?;
    let told = run.ours(Work::Vhost, "told", Pick::Min)?;
    let removal = Value { value: told.value - unheard.value, noise: told.noise };
    let what = "an unmap that a vhost device is told of, above one that it is not, less its call".to_owned();
    let removal = Row::new("C2", what, "ns", AtMost(200.0), removal);
    Ok(vec![answer.done(), removal.done()])
}

/// A VT-d unit.
fn i1(run: &mut Run) -> Rows {
    let mut rows = Vec::new();
    let counts = [("1k".to_owned(), "few"), (run.big(), "many")];
    let mut of = |figure: &str| run.ours(Work::Vtd, figure, Pick::Min);
    let over =
        |more: Value, less: Value| Value { value: more.value / less.value, noise: more.noise + less.noise };
    rows.push(
        Row::new("none", "VT-d: invalidation of one changed page, a mirror", "ns", Limit::None, of("page")?)
            .done(),
    );
    for (count, figure) in counts {
        let (narrow, wide) = (of(&format!("global 39 {figure}"))?, of(&format!("global 48 {figure}"))?);
        let what = format!("VT-d: global invalidation, {count} live, 2^48, a page");
        rows.push(Row::new("none", what, "ns", Limit::None, wide).done());
        let what = format!("the same beside 2^39, {count} live");
        rows.push(Row::new("I1", what, "x", AtMost(1.5), over(wide, narrow)).done());
    }
    let growth = over(of("global 48 many")?, of("global 48 few")?);
    rows.push(Row::new("I1", "growth of that for a page from 1k live", "x", AtMost(1.5), growth).done());
    let (hit, owned) = (of("hit")?, of("owned")?);
    rows.push(Row::new("none", "VT-d: translate, in the IOTLB", "ns", Limit::None, hit).done());
    rows.push(Row::new("I1", "that beside the owned record", "x", AtMost(1.5), over(hit, owned)).done());
    rows.push(Row::new("none", "VT-d: translate, walked", "ns", Limit::None, of("miss")?).done());
    Ok(rows)
}

fn v1(run: &mut Run) -> Rows {
    let mut rows = Vec::new();
    for mirrors in MIRRORS {
        for batch in BATCHES {
            let ring = run.ours(Work::Ring, &format!("ring {mirrors} {batch}"), Pick::Min)?;
            let bare = run.ours(Work::Ring, &format!("bare {mirrors} {batch}"), Pick::Min)?;
            let case = format!("{batch} requests a kick, {mirrors} mirrors");
            let rate = Value { value: 2000.0 / ring.value, noise: ring.noise };
            rows.push(Row::new("none", format!("requests, {case}"), "M/s", Limit::None, rate).done());
            let more = ring.value - bare.value;
            let noise = (ring.value * ring.noise + bare.value * bare.noise) / more.max(1.0);
            let asked = mirrors == 0 && batch == 16;
            let (goal, limit) = if asked { ("V1", AtMost(250.0)) } else { ("none", Limit::None) };
            let what = format!("a pair more than the record's, {case}");
            rows.push(Row::new(goal, what, "ns", limit, Value { value: more, noise }).done());
            let share = Value { value: bare.value / ring.value * 100.0, noise: ring.noise };
            rows.push(Row::new("none", format!("of it the record, {case}"), "%", Limit::None, share).done());
        }
    }
    Ok(rows)
}

fn busy(run: &mut Run) -> Rows {
    let mut rows = Vec::new();
    for (what, figure, unit) in [
        ("16 busy readers and a churner: reads", "reads", "M/s"),
        ("16 busy readers and a churner: pairs", "pairs", "M/s"),
        ("16 busy readers and a churner: unmap + wait, p50", "wait p50", "ns"),
        ("16 busy readers and a churner: unmap + wait, p99.9", "wait p99.9", "ns"),
    ] {
        let ours = run.ours(Work::Busy, figure, Pick::Median)?;
        rows.push(Row::new("none", what, unit, Limit::None, ours).done());
    }
    Ok(rows)
}
