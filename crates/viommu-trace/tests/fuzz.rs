//! The fuzz body on the corpus, on everything that it can be cut to, and on seeded mutations.

use std::io::Cursor;

use viommu_trace::fuzzing::fuzz_reader;
use viommu_trace::{History, Writer, convert};

fn corpus() -> Vec<(String, Vec<u8>)> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata");
    let mut files = Vec::new();
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        if let Ok(mut history) = History::from_reader(Cursor::new(bytes.clone()), "corpus") {
            let mut writer = Writer::new(Vec::new()).unwrap();
            convert(&mut history, &mut writer).unwrap();
            files.push((format!("{} converted", path.display()), writer.finish().unwrap()));
        }
        files.push((path.display().to_string(), bytes));
    }
    files.sort();
    assert!(files.len() > 10);
    files
}

/// xorshift64*: the same inputs in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n.max(1) as u64).unwrap()
    }
}

#[test]
fn the_corpus_and_all_its_cuts_are_survived() {
    for (_, bytes) in corpus() {
        fuzz_reader(&bytes);
        for len in 0..bytes.len().min(1500) {
            fuzz_reader(&bytes[..len]);
        }
    }
}

#[test]
fn seeded_mutations_of_the_corpus_are_survived() {
    let mut random = Random(0x7669_6f6d_6d75_0001);
    let files = corpus();
    let words: [&[u8]; 8] = [
        b"0x",
        b"ffffffffffffffff",
        b"-1",
        b"\n",
        b"18446744073709551616",
        b"IOMMU: iova=",
        b"\xff\xff\xff\xff",
        b"{0x,",
    ];
    for round in 0..3000 {
        let (_, bytes) = &files[round % files.len()];
        let mut bytes = bytes.clone();
        bytes.truncate(8192);
        for _ in 0..=random.below(6) {
            let at = random.below(bytes.len());
            match random.below(4) {
                0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
                1 => {
                    let end = (at + random.below(40)).min(bytes.len());
                    bytes.drain(at..end);
                }
                2 => {
                    let end = (at + random.below(200)).min(bytes.len());
                    let copy = bytes[at..end].to_vec();
                    let to = random.below(bytes.len());
                    bytes.splice(to..to, copy);
                }
                _ => {
                    let word = words[random.below(words.len())].to_vec();
                    bytes.splice(at..at, word);
                }
            }
        }
        fuzz_reader(&bytes);
    }
}

#[test]
fn own_files_with_right_checksums_and_wrong_records_are_survived() {
    let mut random = Random(0x7669_6f6d_6d75_0002);
    for _ in 0..5000 {
        let payload: Vec<u8> = (0..random.below(120)).map(|_| random.next().to_le_bytes()[0]).collect();
        let length = u32::try_from(payload.len()).unwrap().to_le_bytes();
        let crc = crc32fast::hash(&[&[1], &length[..], &payload].concat()).to_le_bytes();
        let flags = random.next().to_le_bytes()[0] & 1;
        fuzz_reader(&[b"viommu\0\x01\x00", &[flags, 1][..], &length, &crc, &payload].concat());
    }
}
