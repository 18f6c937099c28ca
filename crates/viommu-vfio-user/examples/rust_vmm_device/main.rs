//! A PCI device in a process of its own, for who puts an IOMMU in front of it: `rust_vmm_device SOCKET`. It serves one
//! client after the other, and says what they have it do.
//!
//! The server is the `vfio_user` crate's, of rust-vmm: nothing of viommu is in it.
//! ```text
//! rust_vmm_device SOCKET
//! viommu serve --socket-dir DIR --endpoint 00:02.0=proxy:SOCKET
//! ```

#[expect(dead_code, reason = "the tests use more of it")]
mod device;

use std::error::Error;
use std::io::{Write, stdout};
use std::path::Path;
use std::process::ExitCode;

use device::Device;
use vfio_user::Server;

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let [socket] = &words[..] else {
        eprintln!("error: it takes a socket's path");
        return ExitCode::from(2);
    };
    match serve(Path::new(socket)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(socket: &Path) -> Result<(), Box<dyn Error>> {
    let say = |line: String| {
        // Who reads it may have gone.
        let _gone = writeln!(stdout(), "{line}").and_then(|()| stdout().flush());
    };
    let mut device = Device::new(move |told| say(format!("{told:?}")))?;
    let server = Server::new(socket, true, Device::irqs(), device.regions())?;
    say("ready".into());
    loop {
        match server.run(&mut device) {
            Ok(()) => say(format!("Gone, with {} windows", device.windows().len())),
            Err(error @ vfio_user::Error::SocketAccept(_)) => return Err(error.into()),
            Err(error) => say(format!("Gone: {error}")),
        }
        device.gone();
    }
}
