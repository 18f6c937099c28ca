use clap::Parser;

use super::*;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    serve: Serve,
}

pub(crate) fn plan_in(directory: &Path, more: &[&str]) -> Result<ServePlan, String> {
    let directory = directory.to_str().unwrap();
    let first = ["serve", "--socket-dir", directory];
    let line = Line::try_parse_from(first.iter().chain(more)).map_err(|why| why.to_string())?;
    ServePlan::new(&line.serve).map_err(|why| why.to_string())
}

fn plan(more: &[&str]) -> Result<ServePlan, String> {
    plan_in(tempfile::tempdir().unwrap().path(), more)
}

#[test]
fn without_options_there_is_an_iommu_with_x86s_interrupts() {
    let plan = plan(&[]).unwrap();
    let iommu = plan.iommu.unwrap();
    assert_eq!((iommu.address, iommu.bypass, iommu.page_size_mask), (Bdf(8), true, !0xfff));
    assert_eq!(iommu.regions.len(), 1);
    assert_eq!(iommu.regions[0].range, IovaRange::new(Iova(0xfee0_0000), Iova(0xfeef_ffff)).unwrap());
    assert_eq!(iommu.regions[0].kind, RegionKind::Msi);
    assert_eq!((iommu.input_range, iommu.max_mappings, iommu.max_domains), (IovaRange::ALL, None, None));
    assert_eq!((plan.memory, plan.record, plan.devices.len()), (512 << 20, None, 0));
    assert!(!plan.allow_unsealed_memory);
}

#[test]
fn every_option_reaches_the_plan() {
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk.img");
    std::fs::write(&disk, [0; 4096]).unwrap();
    let blk = format!("00:04.0=blk:{},ro,queues=2", disk.display());
    let sockets = directory.path().join("a/b");
    let record = directory.path().join("record");
    let more = [
        "--iommu",
        "00:03.0",
        "--endpoint",
        &blk,
        "--endpoint",
        "00:02.0=rng",
        "--endpoint",
        "00:02.1=rng",
        "--endpoint",
        "01:00.0-02:1f.7=hotplug",
        "--bypass",
        "off",
        "--page-sizes",
        "4K,2M,1G",
        "--reserved",
        "none",
        "--reserved",
        "0x2000-0x2fff:reserved",
        "--reserved",
        "4096-8191:msi",
        "--aperture",
        "0-0xffffffff",
        "--max-mappings",
        "9",
        "--max-domains",
        "3",
        "--record",
        record.to_str().unwrap(),
        "--memory",
        "2G",
        "--allow-unsealed-memory",
    ];
    let plan = plan_in(&sockets, &more).unwrap();
    assert!(sockets.is_dir());
    let iommu = plan.iommu.as_ref().unwrap();
    assert_eq!((iommu.address, iommu.bypass, iommu.page_size_mask), (Bdf(0x18), false, 0x4020_1000));
    let starts: Vec<u64> = iommu.regions.iter().map(|region| region.range.start().0).collect();
    assert_eq!(starts, [0x1000, 0x2000]);
    assert_eq!(iommu.regions[0].kind, RegionKind::Msi);
    assert_eq!(iommu.input_range, IovaRange::new(Iova(0), Iova(0xffff_ffff)).unwrap());
    assert_eq!((iommu.max_mappings, iommu.max_domains, iommu.probe_size()), (Some(9), Some(3), 512));
    let addresses: Vec<u16> = plan.devices.iter().map(|device| device.address.0).collect();
    assert_eq!(addresses, [0x10, 0x11, 0x20]);
    assert_eq!(plan.devices[2].kind, Kind::Blk { file: disk, read_only: true, queues: 2 });
    assert!(
        plan.takes_hotplug(Bdf(0x100)) && plan.takes_hotplug(Bdf(0x2ff)) && !plan.takes_hotplug(Bdf(0x300))
    );
    assert_eq!((plan.memory, plan.record), (2 << 30, Some(record)));
    assert!(plan.allow_unsealed_memory);
}

#[test]
fn every_wrong_option_is_named_with_what_is_wrong() {
    for (more, why) in [
        (&["--iommu", "1.0"][..], "--iommu 1.0: \"1.0\" is no PCI function"),
        (&["--iommu", "00:00.0"], "--iommu 00:00.0: that is the host bridge"),
        (&["--iommu", "00:1f.0"], "chip set"),
        (&["--iommu", "01:00.0"], "must be on bus 00"),
        (&["--iommu", "00:01.1"], "must be function 0"),
        (&["--endpoint", "rng"], "--endpoint rng: BDF=DEVICE or FIRST-LAST=hotplug is expected"),
        (&["--endpoint", "2=rng"], "\"2\" is no PCI function"),
        (&["--endpoint", "00:02.0-=hotplug"], "\"\" is no PCI function"),
        (&["--endpoint", "00:01.0=rng"], "--endpoint 00:01.0=rng: the IOMMU itself is there"),
        (&["--endpoint", "00:01.0-00:03.0=hotplug"], "the IOMMU itself is there"),
        (&["--endpoint", "00:00.0=rng"], "host bridge"),
        (&["--endpoint", "00:1f.2=rng"], "chip set"),
        (&["--endpoint", "00:03.0-00:02.0=hotplug"], "00:02.0 is before 00:03.0"),
        (&["--endpoint", "00:02.0-00:03.0=rng"], "can only be for hotplug"),
        (&["--endpoint", "00:02.0=rng", "--endpoint", "00:02.0=rng"], "there is a device at 00:02.0 already"),
        (
            &["--endpoint", "00:02.0=rng", "--endpoint", "00:02.0-00:03.7=hotplug"],
            "there is a device at 00:02.0 already",
        ),
        (
            &["--endpoint", "00:02.0-00:03.7=hotplug", "--endpoint", "00:02.0=rng"],
            "--endpoint 00:02.0=rng: it meets 00:02.0-00:03.7=hotplug",
        ),
        (&["--endpoint", "01:00.0-01:00.7=hotplug", "--endpoint", "01:00.7-02:00.0=hotplug"], "it meets"),
        (&["--endpoint", "01:02.0=rng"], "bus 01 is behind a root port"),
        (&["--endpoint", "00:02.1=rng"], "a guest looks at 00:02.0 before it looks at 00:02.1"),
        (&["--endpoint", "00:02.0=net"], "--endpoint 00:02.0=net: \"net\" is no device"),
        (
            &["--endpoint", "00:02.0=blk:/nowhere/x"],
            "--endpoint 00:02.0=blk:/nowhere/x: /nowhere/x: No such file",
        ),
        (&["--page-sizes", "4K,3M"], "--page-sizes 4K,3M: \"3M\" is no size of a page"),
        (&["--page-sizes", "2K"], "\"2K\" is no size"),
        (&["--page-sizes", ""], "\"\" is no size"),
        (&["--page-sizes", "+4K"], "\"+4K\" is no size"),
        (&["--page-sizes", "99999999999T"], "is no size"),
        (&["--reserved", "0x1000-0x1fff"], "START-END:msi or START-END:reserved"),
        (&["--reserved", "0x1000-0x1fff:x"], "\"x\" is no kind of region"),
        (
            &["--reserved", "0x1000-0x2000:reserved"],
            "--reserved 0x1000-0x2000:reserved: it is not made of pages",
        ),
        (&["--reserved", "0x2000-0x1fff:reserved"], "it ends before it starts"),
        (&["--reserved", "x-y:reserved"], "START-END is expected"),
        (&["--reserved", "0xfee00000-0xfee00fff:reserved"], "it meets 0xfee00000-0xfeefffff"),
        (&["--reserved", "0x1000-0x1fff:msi"], "one region for interrupts is there already"),
        (
            &["--aperture", "0x1000-0x1000"],
            "--aperture 0x1000-0x1000: it is not made of pages of 0x1000 bytes",
        ),
        (&["--page-sizes", "2M", "--aperture", "0-0x2fffff"], "pages of 0x200000 bytes"),
        (&["--aperture", "7"], "START-END is expected"),
        (&["--memory", "0"], "--memory 0: a size in whole MiB"),
        (&["--memory", "1000"], "whole MiB"),
        (&["--memory", "1X"], "whole MiB"),
        (&["--record", "/nowhere/x"], "--record /nowhere/x: its directory is not there"),
        (&["--record", "/"], "--record /: it is a directory"),
        (&["--no-iommu"], "nothing to serve"),
        (&["--max-mappings", "0"], "--max-mappings"),
        (&["--max-domains", "x"], "--max-domains"),
        (&["--bypass", "maybe"], "--bypass"),
    ] {
        let said = plan(more).expect_err(&format!("{more:?}"));
        assert!(said.contains(why), "{more:?}: {said}");
    }
}

#[test]
fn a_directory_that_sockets_cannot_be_in_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(plan_in(&file, &[]).unwrap_err().contains("it cannot be made"));
    assert!(plan_in(&file.join("below"), &[]).unwrap_err().contains("it cannot be made"));
    let room = SUN_PATH - "/00-00.0.sock".len() - directory.path().as_os_str().len() - 2;
    let fits = directory.path().join("d".repeat(room));
    assert_eq!(plan_in(&fits, &[]).unwrap().socket(Bdf(0)).as_os_str().len(), SUN_PATH - 1);
    let said = plan_in(&directory.path().join("d".repeat(room + 1)), &[]).unwrap_err();
    let most = fits.as_os_str().len();
    assert!(said.contains(&format!("has {} bytes", most + 1)), "{said}");
    assert!(said.contains(&format!("room for {most}")), "{said}");
    assert!(!directory.path().join("d".repeat(room + 1)).exists());
}

#[test]
fn a_wrong_option_makes_no_directory() {
    let directory = tempfile::tempdir().unwrap();
    let sockets = directory.path().join("sockets");
    assert!(plan_in(&sockets, &["--memory", "1"]).is_err());
    assert!(!sockets.exists());
}

#[test]
fn shares_slot_when_another_function_is_there_or_may_come() {
    let more = ["--endpoint", "00:02.0=rng", "--endpoint", "00:02.3=rng", "--endpoint", "00:03.0=rng"];
    let more: Vec<&str> = more.into_iter().chain(["--endpoint", "01:00.0-01:00.1=hotplug"]).collect();
    let more: Vec<&str> = more.into_iter().chain(["--endpoint", "02:00.0=hotplug"]).collect();
    let plan = plan(&more).unwrap();
    let shares = |text: &str| plan.shares_slot(text.parse().unwrap());
    assert!(shares("00:02.0") && shares("00:02.3") && shares("01:00.0") && shares("01:00.1"));
    assert!(!shares("00:03.0") && !shares("00:01.0") && !shares("02:00.0"));
}

#[test]
fn names_of_sockets_are_by_address() {
    let plan = plan(&[]).unwrap();
    let name = |path: PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    assert_eq!(name(plan.socket("00:02.0".parse().unwrap())), "00-02.0.sock");
    assert_eq!(name(plan.iommu_socket()), "iommu.sock");
    assert_eq!(name(plan.control_socket()), "control.sock");
    assert_eq!(name(plan.viot_file()), "viot.bin");
}

#[test]
fn a_vtd_unit_has_options_of_its_own_and_none_of_the_virtio_iommu() {
    let vtd = |text: &str| plan(&["--iommu", text]).map(|plan| plan.iommu.unwrap());
    let iommu = vtd("vtd@00:04.0").unwrap();
    assert_eq!(iommu.address, Bdf(0x20));
    assert_eq!(iommu.model, Model::Vtd(VtdPlan { caching_mode: true, scalable: None, base: None }));
    let iommu = vtd("vtd@00:01.0,caching-mode=off,base=0xfebfc000").unwrap();
    let expected = VtdPlan { caching_mode: false, scalable: None, base: Some(0xfebf_c000) };
    assert_eq!(iommu.model, Model::Vtd(expected));
    for (text, stage) in [("first-stage", Stage::First), ("second-stage", Stage::Second)] {
        let iommu = vtd(&format!("vtd@00:01.0,scalable={text}")).unwrap();
        let expected = VtdPlan { caching_mode: true, scalable: Some(stage), base: None };
        assert_eq!(iommu.model, Model::Vtd(expected));
    }
    for wrong in [
        "vtd@",
        "vtd@00:01.1",
        "vtd@00:1f.0",
        "vtd@00:01.0,",
        "vtd@00:01.0,caching-mode",
        "vtd@00:01.0,caching-mode=maybe",
        "vtd@00:01.0,base=0xfebfc001",
        "vtd@00:01.0,base=0",
        "vtd@00:01.0,granule=4K",
        "vtd@00:01.0,scalable",
        "vtd@00:01.0,scalable=on",
        "amd@00:01.0",
    ] {
        assert!(vtd(wrong).is_err(), "{wrong}");
    }
    for other in
        [["--bypass", "off"], ["--page-sizes", "4K"], ["--aperture", "0-0xfff"], ["--reserved", "none"]]
    {
        assert!(plan(&[&["--iommu", "vtd@00:01.0"], &other[..]].concat()).is_err(), "{other:?}");
    }
    let hotplug = |range: &str| plan(&["--iommu", "vtd@00:01.0", "--endpoint", &format!("{range}=hotplug")]);
    assert!(hotplug("01:00.0-01:1f.7").is_ok());
    let said = hotplug("00:04.0-01:00.7").unwrap_err();
    assert!(said.starts_with("--endpoint 00:04.0-01:00.7=hotplug: "), "{said}");
    assert!(plan(&["--iommu", "vtd@00:01.0", "--record", "f"]).is_ok());
    let said = plan(&["--iommu", "vtd@00:01.0,caching-mode=off", "--record", "f"]).unwrap_err();
    assert!(said.starts_with("--record f: without caching mode"), "{said}");
    let said = plan(&["--iommu", "vtd@00:01.0,scalable=first-stage", "--record", "f"]).unwrap_err();
    assert!(said.starts_with("--record f: in first-stage tables"), "{said}");
    let plan = plan(&["--iommu", "vtd@00:01.0"]).unwrap();
    assert!(plan.table_file().ends_with("dmar.bin") && plan.viot_file().ends_with("viot.bin"));
}
