//! `viommu status`, `plug` and `unplug` where nobody serves.

#[expect(dead_code, reason = "of the helpers few are needed here")]
mod common;

use common::{scratch, viommu};

#[test]
fn where_nobody_serves_each_says_so_and_ends_with_2() {
    let directory = scratch("nobody");
    std::fs::create_dir_all(&directory).unwrap();
    let directory = directory.to_str().unwrap();
    for line in [
        &["status", "--socket-dir", directory][..],
        &["status", "--json", "--socket-dir", directory],
        &["status", "--watch", "--socket-dir", directory],
        &["plug", "--socket-dir", directory, "01:00.0=rng"],
        &["unplug", "--socket-dir", directory, "01:00.0"],
    ] {
        let run = viommu(line, b"");
        assert_eq!((run.status, run.out.as_str()), (2, ""), "{line:?}: {}", run.err);
        let said = format!("viommu: nobody serves in {directory}: start `viommu serve --socket-dir` there\n");
        assert_eq!(run.err, said, "{line:?}");
    }
}

#[test]
fn what_is_no_device_or_address_is_said_before_anybody_is_asked() {
    for (line, why) in [
        (&["plug", "--socket-dir", "/nowhere", "01:00.0"][..], "BDF=DEVICE is expected"),
        (&["plug", "--socket-dir", "/nowhere", "1=rng"], "no PCI function"),
        (&["plug", "--socket-dir", "/nowhere", "01:00.0=gpu"], "no device"),
        (&["unplug", "--socket-dir", "/nowhere", "x"], "no PCI function"),
        (&["status", "--socket-dir", "/nowhere", "--watch", "--json"], "cannot be used with"),
        (&["status", "--socket-dir", "/nowhere", "--interval", "0"], "0.1 to 3600"),
    ] {
        let run = viommu(line, b"");
        assert_eq!(run.status, 2, "{line:?}");
        assert!(run.err.contains(why), "{line:?}: {}", run.err);
    }
}
