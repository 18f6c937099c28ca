use std::process::Command;

use super::*;
use crate::serve::options::tests::plan_in;

/// Two functions in a slot, one behind the third root port, and room for more behind the first.
fn plan(directory: &std::path::Path) -> ServePlan {
    let more = [
        "--endpoint",
        "00:02.0=rng",
        "--endpoint",
        "00:02.1=rng",
        "--endpoint",
        "00:1e.0=rng",
        "--endpoint",
        "03:00.0=rng",
        "--endpoint",
        "01:00.0-01:00.7=hotplug",
        "--memory",
        "1G",
    ];
    plan_in(directory, &more).unwrap()
}

fn devices(all: &[String]) -> Vec<&str> {
    let options = all.iter().zip(all.iter().skip(1));
    options.filter(|(option, _)| *option == "-device").map(|(_, value)| value.as_str()).collect()
}

#[test]
fn arguments_have_memory_table_ports_and_a_device_for_each_socket() {
    let directory = tempfile::tempdir().unwrap();
    let all = arguments(&plan(directory.path()), &["tcg"]).unwrap();
    let path = directory.path().display();
    let first = [
        "-M",
        "q35",
        "-accel",
        "tcg",
        "-m",
        "1024M",
        "-object",
        "memory-backend-memfd,id=ram,size=1024M,share=on",
        "-machine",
        "memory-backend=ram",
        "-acpitable",
    ];
    assert_eq!(all[..11], first);
    assert_eq!(all[11], format!("file={path}/viot.bin"));
    let devices = devices(&all);
    // 1e is taken, so the ports are in 1d; their order is that of the buses.
    assert_eq!(
        devices[..3],
        [
            "pcie-root-port,id=port01,bus=pcie.0,addr=1d.0,multifunction=on,chassis=1,slot=1",
            "pcie-root-port,id=port02,bus=pcie.0,addr=1d.1,chassis=2,slot=2",
            "pcie-root-port,id=port03,bus=pcie.0,addr=1d.2,chassis=3,slot=3",
        ]
    );
    let shown: Vec<Value> = devices[3..].iter().map(|text| serde_json::from_str(text).unwrap()).collect();
    let expected = |name: &str, bus: &str, addr: &str, socket: &str| {
        json!({"driver": "vfio-user-pci", "id": name, "bus": bus, "addr": addr,
               "socket": {"type": "unix", "path": format!("{path}/{socket}.sock")}})
    };
    let with = |mut device: Value| {
        device["multifunction"] = true.into();
        device
    };
    assert_eq!(
        shown,
        [
            expected("vfu-00-01.0", "pcie.0", "1.0", "iommu"),
            with(expected("vfu-00-02.0", "pcie.0", "2.0", "00-02.0")),
            with(expected("vfu-00-02.1", "pcie.0", "2.1", "00-02.1")),
            expected("vfu-00-1e.0", "pcie.0", "1e.0", "00-1e.0"),
            expected("vfu-03-00.0", "port03", "0.0", "03-00.0"),
        ]
    );
    let qmp = format!("unix:{path}/qmp.sock,server=on,wait=off");
    assert_eq!(all[all.len() - 2..], ["-qmp".to_owned(), qmp]);
}

#[test]
fn arguments_without_an_iommu_have_no_table() {
    let directory = tempfile::tempdir().unwrap();
    let plan = plan_in(directory.path(), &["--no-iommu", "--endpoint", "00:02.0=rng"]).unwrap();
    let all = arguments(&plan, &[]).unwrap();
    assert!(
        !all.iter().any(|argument| argument == "-acpitable" || argument == "-qmp" || argument == "-accel")
    );
    assert_eq!(devices(&all).len(), 1);
}

#[test]
fn the_command_line_is_read_by_a_shell_as_it_is_meant() {
    let directory = tempfile::tempdir().unwrap();
    let odd = directory.path().join("it's $HOME, \"quoted\"; x");
    let plan = plan(&odd);
    let text = command_line(&plan).unwrap();
    let shown = text.replacen("qemu-system-x86_64", "show", 1);
    let script = format!("show() {{ printf '%s\\0' \"$@\"; }}\n{shown}\n");
    let run = Command::new("sh").arg("-c").arg(script).output().unwrap();
    assert!(run.status.success(), "{run:?}");
    let words: Vec<String> =
        String::from_utf8(run.stdout).unwrap().split_terminator('\0').map(str::to_owned).collect();
    let mut all = arguments(&plan, &["kvm", "tcg"]).unwrap();
    let own =
        ["-display", "none", "-serial", "mon:stdio", "-kernel", "KERNEL", "-initrd", "INITRD", "-append"];
    all.extend(own.map(str::to_owned));
    all.push("console=ttyS0".into());
    assert_eq!(words, all);
    let table = words.iter().find(|word| word.starts_with("file=")).unwrap();
    assert!(table.contains("it's $HOME,, \"quoted\"; x/viot.bin"), "{table}");
    assert!(text.lines().all(|line| line.len() < 300), "a line an option");
}

#[test]
fn more_buses_than_there_can_be_ports_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let check_of = |more: &[&str]| plan_in(directory.path(), more).map(|plan| check(&plan).unwrap());
    assert_eq!(check_of(&["--endpoint", "e0:00.0=rng"]), Ok(()));
    let said = check_of(&["--endpoint", "ff:00.0=rng"]).unwrap_err();
    assert!(said.contains("--endpoint on bus ff: it takes 255 root ports, and 29 slots"), "{said}");
    assert!(check_of(&["--endpoint", "00:02.0-01:00.7=hotplug"]).is_err());
}

#[test]
fn lines_for_a_device_that_comes_later_name_the_same_device() {
    let directory = tempfile::tempdir().unwrap();
    let plan = plan(directory.path());
    let address: Bdf = "01:00.0".parse().unwrap();
    let add: Value = serde_json::from_str(&device_add(&plan, address)).unwrap();
    assert_eq!(add["execute"], "device_add");
    assert_eq!(
        (&add["arguments"]["bus"], &add["arguments"]["multifunction"]),
        (&json!("port01"), &json!(true))
    );
    let socket = directory.path().join("01-00.0.sock");
    assert_eq!(add["arguments"]["socket"]["path"], socket.to_str().unwrap());
    let del: Value = serde_json::from_str(&device_del(address)).unwrap();
    assert_eq!(del, json!({"execute": "device_del", "arguments": {"id": add["arguments"]["id"]}}));
}

#[test]
fn places_where_nothing_can_be_plugged_are_told() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(not_pluggable(&plan(directory.path())), None);
    let range = ["--endpoint", "00:04.0-00:07.7=hotplug"];
    let said = not_pluggable(&plan_in(directory.path(), &range).unwrap()).unwrap();
    assert!(said.starts_with("00:04.0-00:07.7:"), "{said}");
}
