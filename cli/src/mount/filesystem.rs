//! The kernel's questions, each answered by a task of its own, so that one that waits for the store holds up no other.

use std::ffi::OsStr;
use std::future::Future;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use fuser::{
    AccessFlags, Config, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyOpen, ReplyXattr, Request, Session, SessionACL, SessionUnmounter,
};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::served::{Entries, Item, Served};

/// The most that the kernel reads ahead.
const READ_AHEAD_BYTES: u32 = 1 << 20;
/// Nothing is ever written.
const MAX_WRITE_BYTES: u32 = 4 << 10;
/// An attribute's value is asked for with room for it, or only for its length.
const ONLY_LENGTH: u32 = 0;

/// A mounted file system.
pub(crate) struct Mounted {
    unmounter: SessionUnmounter,
    /// How it ended.
    pub(crate) ended: oneshot::Receiver<io::Result<()>>,
}

impl Mounted {
    /// Unmounts it. Fails while programs use it.
    pub(crate) fn unmount(&mut self) -> io::Result<()> {
        self.unmounter.unmount()
    }
}

/// Mounts `served` at an empty folder, for this user alone or for all. To be called in a runtime.
pub(crate) fn mount(served: Arc<Served>, mountpoint: &Path, allow_other: bool) -> io::Result<Mounted> {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("lifeboat".to_owned()),
        MountOption::RO,
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoAtime,
    ];
    if allow_other {
        config.acl = SessionACL::All;
        config.mount_options.push(MountOption::DefaultPermissions);
    }
    let asked = Asked { served, runtime: Handle::current(), checks_permissions: allow_other };
    let mut session = Session::new(asked, mountpoint, &config)?;
    let unmounter = session.unmount_callable();
    let (tell, ended) = oneshot::channel();
    std::thread::Builder::new().name("mount".to_owned()).spawn(move || {
        // Nobody listens when the program is about to end.
        let _ = tell.send(session.run());
    })?;
    Ok(Mounted { unmounter, ended })
}

struct Asked {
    served: Arc<Served>,
    runtime: Handle,
    checks_permissions: bool,
}

impl Asked {
    fn answer<F: Future<Output = ()> + Send + 'static>(&self, answer: impl FnOnce(Arc<Served>) -> F) {
        self.runtime.spawn(answer(Arc::clone(&self.served)));
    }
}

impl Entries for ReplyDirectory {
    fn add(&mut self, item: &Item, offset: u64, name: &[u8]) -> bool {
        Self::add(self, INodeNo(item.number), offset, item.attributes.kind, OsStr::from_bytes(name))
    }
}

impl Entries for ReplyDirectoryPlus {
    fn add(&mut self, item: &Item, offset: u64, name: &[u8]) -> bool {
        let Item { number, attributes, name_for, .. } = item;
        Self::add(self, INodeNo(*number), offset, OsStr::from_bytes(name), name_for, attributes, Generation(0))
    }
}

/// Answers with bytes, or with how many there are.
fn answer_bytes(reply: ReplyXattr, bytes: &[u8], room: u32) {
    match u32::try_from(bytes.len()) {
        Ok(len) if room == ONLY_LENGTH => reply.size(len),
        Ok(len) if len <= room => reply.data(bytes),
        _ => reply.error(Errno::ERANGE),
    }
}

impl Filesystem for Asked {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // What this kernel or machine does not take is done without.
        let _ = config.set_max_write(MAX_WRITE_BYTES);
        if let Err(most) = config.set_max_readahead(READ_AHEAD_BYTES) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.add_capabilities(InitFlags::FUSE_DO_READDIRPLUS | InitFlags::FUSE_READDIRPLUS_AUTO);
        let _ = config.add_capabilities(InitFlags::FUSE_PARALLEL_DIROPS);
        // With this flag the kernel checks access control lists; without it, only permission bits, which may allow more.
        if self.checks_permissions && config.add_capabilities(InitFlags::FUSE_POSIX_ACL).is_err() {
            return Err(io::Error::other("this kernel does not check access control lists of a mount in user space"));
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.as_bytes().to_vec();
        self.answer(|served| async move {
            match served.look_up(parent.0, &name).await {
                Ok(Item { attributes, name_for, attributes_for, .. }) => {
                    reply.entry_with_ttls(&name_for, &attributes_for, &attributes, Generation(0));
                }
                Err(error) => reply.error(error),
            }
        });
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.answer(|served| async move {
            match served.attributes(number.0).await {
                Ok(item) => reply.attr(&item.attributes_for, &item.attributes),
                Err(error) => reply.error(error),
            }
        });
    }

    fn readlink(&self, _: &Request, number: INodeNo, reply: ReplyData) {
        self.answer(|served| async move {
            match served.link_target(number.0).await {
                Ok(target) => reply.data(&target),
                Err(error) => reply.error(error),
            }
        });
    }

    fn open(&self, _: &Request, number: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.answer(|served| async move {
            match served.open(number.0).await {
                Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::FOPEN_KEEP_CACHE),
                Err(error) => reply.error(error),
            }
        });
    }

    fn read(
        &self,
        _: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.answer(|served| async move {
            // Never closed.
            let _turn = served.reads.acquire().await;
            match served.read(number.0, handle.0, offset, size as usize).await {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => reply.error(error),
            }
        });
    }

    // The kernel asks these never again once they were answered so.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.served.close(handle.0);
        reply.ok();
    }

    fn readdir(&self, _: &Request, number: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.answer(|served| async move {
            match served.list(number.0, offset, &mut reply).await {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(error),
            }
        });
    }

    fn readdirplus(&self, _: &Request, number: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        self.answer(|served| async move {
            match served.list(number.0, offset, &mut reply).await {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(error),
            }
        });
    }

    fn getxattr(&self, _: &Request, number: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let name = name.as_bytes().to_vec();
        self.answer(|served| async move {
            match served.xattrs(number.0).await {
                Ok(xattrs) => match xattrs.iter().find(|(other, _)| *other == name) {
                    Some((_, value)) => answer_bytes(reply, value, size),
                    None => reply.error(Errno::ENODATA),
                },
                Err(error) => reply.error(error),
            }
        });
    }

    fn listxattr(&self, _: &Request, number: INodeNo, size: u32, reply: ReplyXattr) {
        self.answer(|served| async move {
            match served.xattrs(number.0).await {
                Ok(xattrs) => {
                    let names: Vec<u8> = xattrs.into_iter().flat_map(|(name, _)| [&name[..], &[0]].concat()).collect();
                    answer_bytes(reply, &names, size);
                }
                Err(error) => reply.error(error),
            }
        });
    }

    fn lseek(&self, _: &Request, number: INodeNo, handle: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        /// The kernel's numbers.
        const SEEK_DATA: i32 = 3;
        const SEEK_HOLE: i32 = 4;
        self.answer(|served| async move {
            let is_data = match whence {
                SEEK_DATA => true,
                SEEK_HOLE => false,
                _ => return reply.error(Errno::EINVAL),
            };
            let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
            match served.seek(number.0, handle.0, offset, is_data).await.map(i64::try_from) {
                Ok(Ok(at)) => reply.offset(at),
                Ok(Err(_)) => reply.error(Errno::EOVERFLOW),
                Err(error) => reply.error(error),
            }
        });
    }
}
