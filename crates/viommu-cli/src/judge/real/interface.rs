//! Which interfaces there are, how they are named, and how mirrors over them are made.

use core::fmt;
use core::str::FromStr;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use viommu::EndpointId;
use viommu::subscribe::{Binding, Bound, Mirror, Space};
use viommu_vfio::{iommufd, type1};
use viommu_vfio_user::client::{Client, MirrorOptions, NoMemory};
use viommu_vhost::vdpa;

use super::memory::Ram;

/// How long a vfio-user server may take for a reply.
const LIMIT: Duration = Duration::from_secs(5);
/// Whose device an iommufd has: there is one.
const DEVICE: EndpointId = EndpointId::new(0);

type Error = Box<dyn core::error::Error>;

/// An interface as the option names it. A part that is left out is the only one that there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Interface {
    /// A VFIO type1 v2 container with the group of this number.
    Type1(Option<u32>),
    /// An iommufd with the VFIO device of this name.
    Iommufd(Option<String>),
    /// The vhost-vDPA device of this number.
    Vdpa(Option<u32>),
    /// The vfio-user server that listens there.
    VfioUser(PathBuf),
}

impl FromStr for Interface {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, which) = match text.split_once(':') {
            Some((_, "")) => return Err(format!("nothing is named behind the colon of `{text}`")),
            Some((kind, which)) => (kind, Some(which)),
            None => (text, None),
        };
        let number = |which: Option<&str>| {
            let number = which.map(str::parse).transpose();
            number.map_err(|_| format!("`{}` is no number", which.unwrap_or_default()))
        };
        match (kind, which) {
            ("type1", which) => Ok(Self::Type1(number(which)?)),
            ("iommufd", which) => Ok(Self::Iommufd(which.map(str::to_owned))),
            ("vdpa", which) => Ok(Self::Vdpa(number(which)?)),
            ("vfio-user", Some(socket)) => Ok(Self::VfioUser(socket.into())),
            ("vfio-user", None) => Err("vfio-user:SOCKET is expected".into()),
            _ => {
                Err("type1[:GROUP], iommufd[:DEVICE], vdpa[:NUMBER] or vfio-user:SOCKET are expected".into())
            }
        }
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Type1(None) => f.write_str("type1"),
            Self::Type1(Some(group)) => write!(f, "type1:{group}"),
            Self::Iommufd(None) => f.write_str("iommufd"),
            Self::Iommufd(Some(device)) => write!(f, "iommufd:{device}"),
            Self::Vdpa(None) => f.write_str("vdpa"),
            Self::Vdpa(Some(number)) => write!(f, "vdpa:{number}"),
            Self::VfioUser(socket) => write!(f, "vfio-user:{}", socket.display()),
        }
    }
}

/// An interface that is open: mirrors over it are made one after the other, each when the one before it is empty.
pub(super) enum Host {
    Type1 {
        container: OwnedFd,
        /// It leaves the container when this is closed.
        _group: File,
        /// Of the last mirror.
        handle: Option<type1::Handle>,
    },
    Iommufd {
        binding: Box<dyn Binding>,
        /// Keeps the device.
        _handle: iommufd::Handle,
    },
    Vdpa(vdpa::Device),
    VfioUser {
        socket: PathBuf,
        client: Client,
    },
}

impl Host {
    /// # Errors
    /// With the name of what is missing.
    pub(super) fn open(interface: &Interface, memory: &Ram) -> Result<Self, Error> {
        Ok(match interface {
            Interface::Type1(group) => {
                let group = file(&named_or_only("/dev/vfio", "", group.map(|number| number.to_string()))?)?;
                let container = type1::container_of(&[group.as_fd()])?;
                Self::Type1 { container, _group: group, handle: None }
            }
            Interface::Iommufd(device) => {
                let failed = |what: &'static str| move |errno| format!("{what}: {errno}");
                let device = file(&named_or_only("/dev/vfio/devices", "vfio", device.clone())?)?;
                let iommufd = file(Path::new("/dev/iommu"))?;
                let iommufd = iommufd::Iommufd::open(iommufd.into()).map_err(failed("/dev/iommu"))?;
                let device = iommufd.bind(device.into()).map_err(failed("BIND_IOMMUFD"))?;
                let (binding, handle) = iommufd.binding(memory.clone());
                handle.add(DEVICE, Box::new(device)).map_err(failed("the device"))?;
                Self::Iommufd { binding: Box::new(binding), _handle: handle }
            }
            Interface::Vdpa(number) => {
                let name = number.map(|number| format!("vhost-vdpa-{number}"));
                let device = file(&named_or_only("/dev", "vhost-vdpa-", name)?)?;
                vdpa::own(device.as_fd()).map_err(|errno| format!("VHOST_SET_OWNER: {errno}"))?;
                Self::Vdpa(vdpa::Device::open(device.into(), 0)?)
            }
            Interface::VfioUser(socket) => {
                Self::VfioUser { socket: socket.clone(), client: connected(socket)? }
            }
        })
    }

    /// A new mirror, for a domain that its device goes to.
    ///
    /// # Errors
    /// The interface's.
    pub(super) fn mirror(&mut self, space: Space, memory: &Ram) -> Result<Box<dyn Mirror>, Error> {
        Ok(match self {
            Self::Type1 { container, handle, .. } => {
                let container = type1::Container::open(container.try_clone()?)?;
                let (mirror, new) = container.mirror(memory.clone());
                *handle = Some(new);
                Box::new(mirror)
            }
            Self::Iommufd { binding, .. } => binding.mirror_for(space, DEVICE)?,
            Self::Vdpa(device) => Box::new(device.mirror(0, memory.clone())?.0),
            Self::VfioUser { socket, client } => {
                if !client.is_open() {
                    *client = connected(socket)?;
                }
                Box::new(client.mirror(memory.clone(), MirrorOptions::default()).0)
            }
        })
    }

    /// The device uses the mirror that was made for the domain, or none any more.
    ///
    /// # Errors
    /// The interface's: the device is where it was.
    pub(super) fn switch(&mut self, to: Bound) -> Result<(), Error> {
        match self {
            Self::Iommufd { binding, .. } => {
                let _done_when_it_returns = binding.bind(DEVICE, to)?;
            }
            // What is mapped there is what the device has.
            Self::Type1 { .. } | Self::Vdpa(_) | Self::VfioUser { .. } => {}
        }
        Ok(())
    }

    /// Mappings that it must have by what its mirror knows; none where [`Self::room`] says nothing.
    pub(super) fn entries(&self) -> Option<u64> {
        match self {
            Self::Type1 { handle, .. } => Some(handle.as_ref().map_or(0, type1::Handle::entries)),
            Self::Iommufd { .. } | Self::Vdpa(_) | Self::VfioUser { .. } => None,
        }
    }

    /// Mappings that the host says it has room for; none where it does not say.
    pub(super) fn room(&self) -> Option<u32> {
        match self {
            Self::Type1 { container, .. } => {
                let container = type1::Container::open(container.try_clone().ok()?).ok()?;
                container.info().entries
            }
            Self::Iommufd { .. } | Self::Vdpa(_) | Self::VfioUser { .. } => None,
        }
    }
}

fn at(path: &Path, why: &dyn fmt::Display) -> String {
    format!("{}: {why}", path.display())
}

fn connected(socket: &Path) -> Result<Client, Error> {
    let stream = UnixStream::connect(socket).map_err(|why| at(socket, &why))?;
    Ok(Client::connect(stream, LIMIT, NoMemory)?)
}

fn file(path: &Path) -> Result<File, String> {
    File::options().read(true).write(true).open(path).map_err(|why| at(path, &why))
}

/// The file of this name, or else the only one whose name is the prefix and a number.
fn named_or_only(folder: &str, prefix: &str, name: Option<String>) -> Result<PathBuf, String> {
    let folder = Path::new(folder);
    if let Some(name) = name {
        return Ok(folder.join(name));
    }
    let entries = fs::read_dir(folder).map_err(|why| at(folder, &why))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut found: Vec<String> = names.filter(|name| is_numbered(name, prefix)).collect();
    found.sort();
    match &found[..] {
        [one] => Ok(folder.join(one)),
        [] => Err(format!("there is no {prefix}N in {}", folder.display())),
        several => Err(format!("which one of {} in {} is not said", several.join(", "), folder.display())),
    }
}

fn is_numbered(name: &str, prefix: &str) -> bool {
    let number = name.strip_prefix(prefix).unwrap_or_default();
    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_read_as_they_are_written() {
        for text in
            ["type1", "type1:26", "iommufd", "iommufd:vfio0", "vdpa", "vdpa:1", "vfio-user:/run/a:b.sock"]
        {
            assert_eq!(text.parse::<Interface>().unwrap().to_string(), text);
        }
        for text in ["", "type2", "type1:", "type1:x", "vdpa:-1", "vfio-user", "vfio-user:", "vhost"] {
            assert!(text.parse::<Interface>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_only_file_is_found_and_of_several_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        let only = || named_or_only(path, "vfio", None);
        assert!(only().unwrap_err().contains("no vfioN"));
        for name in ["vfio", "vfio7", "vfio7.old"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(only().unwrap(), folder.path().join("vfio7"));
        fs::write(folder.path().join("vfio12"), "").unwrap();
        assert!(only().unwrap_err().contains("vfio12, vfio7"));
        let named = named_or_only(path, "vfio", Some("vfio12".into()));
        assert_eq!(named.unwrap(), folder.path().join("vfio12"));
    }
}
