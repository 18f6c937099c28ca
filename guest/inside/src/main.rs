//! What runs inside the guests of the live tests, where a shell does not do.

mod iommufd;
mod kexec;
mod load;
mod memory;
mod rust_vmm;
mod time;
mod type1;
mod vdpa;
mod vfio;
mod vhost;
mod virtio;

use std::process::ExitCode;

const USAGE: &str = "usage: inside probe BDF GROUP | rust-vmm BDF GROUP | load NAME DISK SEED THREADS BLOCKS WRITES SECONDS | time DISK BYTES COUNT | kexec KERNEL INITRAMFS WORDS | type1 BDF SEED | iommufd BDF SEED | vdpa SEED | vdpa-add KIND | vhost-net SEED STEPS | vhost-vsock SEED STEPS";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["probe", bdf, group] => virtio::probe(bdf, group),
        ["rust-vmm", bdf, group] => rust_vmm::run(bdf, group),
        ["load", name, disk, seed, threads, blocks, writes, seconds] => {
            load::run(name, disk, [seed, threads, blocks, writes, seconds])
        }
        ["time", disk, bytes, count] => time::run(disk, bytes, count),
        ["type1", bdf, seed] => type1::run(bdf, seed),
        ["vdpa-add", kind] => vdpa::add(kind),
        ["vdpa", seed] => vdpa::run(seed),
        ["iommufd", bdf, seed] => iommufd::run(bdf, seed),
        ["vhost-net", seed, steps] => vhost::run(seed, steps),
        ["vhost-vsock", seed, steps] => vhost::vsock::run(seed, steps),
        ["kexec", kernel, initramfs, words] => kexec::run(kernel, initramfs, words),
        _ => Err(USAGE.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("inside: {error}");
            ExitCode::FAILURE
        }
    }
}
