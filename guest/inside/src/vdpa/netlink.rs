//! Has the kernel make a vDPA device of a simulator: `vdpa dev add`, without the program of that name.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::FromRawFd as _,
};

const REQUEST: u16 = 1;
const ACK: u16 = 4;
/// `NLMSG_ERROR`, which an acknowledgement is too.
const ERROR: u16 = 2;
/// `GENL_ID_CTRL`, `CTRL_CMD_GETFAMILY` and its attributes.
const CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
/// `VDPA_CMD_DEV_NEW` and its attributes.
const DEVICE_NEW: u8 = 3;
const MANAGEMENT_NAME: u16 = 2;
const DEVICE_NAME: u16 = 4;

/// Makes the device `name` of the simulator `kind`.
///
/// # Errors
///
/// If the kernel has no such simulator, or a device of that name.
pub(super) fn add(kind: &str, name: &str) -> io::Result<()> {
    // SAFETY: the call takes three numbers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_GENERIC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    let mut socket = unsafe { File::from_raw_fd(fd) };
    let answer = ask(&mut socket, CONTROL, REQUEST, GET_FAMILY, &[(FAMILY_NAME, "vdpa")])?;
    let family = attribute(&answer, FAMILY_ID).ok_or_else(|| io::Error::other("no family of vdpa's"))?;
    ask(&mut socket, family, REQUEST | ACK, DEVICE_NEW, &[(DEVICE_NAME, name), (MANAGEMENT_NAME, kind)])?;
    Ok(())
}

/// Sends a request; the answer, or the error in it.
fn ask(
    socket: &mut File,
    family: u16,
    flags: u16,
    command: u8,
    attributes: &[(u16, &str)],
) -> io::Result<Vec<u8>> {
    let mut body = vec![command, 1, 0, 0];
    for (kind, text) in attributes {
        let length = u16::try_from(4 + text.len() + 1).map_err(io::Error::other)?;
        body.extend_from_slice(&length.to_ne_bytes());
        body.extend_from_slice(&kind.to_ne_bytes());
        body.extend_from_slice(text.as_bytes());
        body.push(0);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let mut message = u32::try_from(16 + body.len()).map_err(io::Error::other)?.to_ne_bytes().to_vec();
    message.extend_from_slice(&family.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&body);
    socket.write_all(&message)?;
    let mut answer = vec![0; 8192];
    let length = socket.read(&mut answer)?;
    answer.truncate(length);
    let is_error = half(&answer, 4) == Some(ERROR);
    let number = answer.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match number.filter(|_| is_error) {
        Some(number) if number != 0 => Err(io::Error::from_raw_os_error(-number)),
        _ => Ok(answer),
    }
}

/// A number among the attributes of an answer.
fn attribute(answer: &[u8], wanted: u16) -> Option<u16> {
    let mut at = 20;
    loop {
        let (length, kind) = (usize::from(half(answer, at)?), half(answer, at + 2)?);
        if kind == wanted {
            return half(answer, at + 4);
        }
        at += length.max(4).next_multiple_of(4);
    }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}
