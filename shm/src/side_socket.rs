//! Packets with descriptors between two processes: SOCK_SEQPACKET over a Unix socket, SCM_RIGHTS.
//!
//! The connection is also the life line: its end of file says that the peer closed it, which together with
//! [`crate::ProcessWatch`] means that the peer is dead.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::{IoSlice, IoSliceMut};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect,
    listen, recvmsg, sendmsg, socket_with, sockopt,
};

use crate::{Error, ProcessWatch};

/// Largest packet, bytes.
const PACKET_BYTES_MAX: usize = 256;

/// One received packet.
#[derive(Debug)]
pub struct Packet {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The descriptor that came with it.
    pub fd: Option<OwnedFd>,
}

/// Who is at the other end, as the kernel recorded it when the connection was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Process id.
    pub pid: u32,
    /// User id: the trust domain.
    pub uid: u32,
}

/// One end of a connection. Non-blocking; use it with the runtime's readiness.
#[derive(Debug)]
pub struct SideSocket(OwnedFd);

impl SideSocket {
    /// Connects to a listening side channel.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let fd = seqpacket(path)?;
        connect(&fd, &address(path)?).map_err(Error::system("connect to", path.display().to_string()))?;
        Ok(Self(fd))
    }

    /// Sends one packet, with a descriptor or without.
    pub fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            let pushed = control.push(SendAncillaryMessage::ScmRights(&fds));
            assert!(pushed, "the buffer has room for one descriptor");
        }
        sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
            .map_err(Error::system("send on", "side channel"))?;
        Ok(())
    }

    /// Receives one packet; `None` at end of file. Would-block is an error that says so.
    pub fn receive(&self) -> Result<Option<Packet>, Error> {
        let mut bytes = vec![0; PACKET_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received =
            recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC);
        let received = received.map_err(Error::system("receive on", "side channel"))?;
        let mut fd = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                fd = fds.last();
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(Error::refused("a side channel packet is too long or carries too much"));
        }
        bytes.truncate(received.bytes);
        Ok(Some(Packet { bytes, fd }))
    }

    /// The process at the other end.
    pub fn peer(&self) -> Result<Peer, Error> {
        let credentials = sockopt::socket_peercred(&self.0)
            .map_err(Error::system("read credentials of", "side channel peer"))?;
        Ok(Peer { pid: credentials.pid.as_raw_nonzero().get().unsigned_abs(), uid: credentials.uid.as_raw() })
    }

    /// Watches the process at the other end.
    pub fn watch_peer(&self) -> Result<ProcessWatch, Error> {
        ProcessWatch::open(self.peer()?.pid)
    }
}

impl AsFd for SideSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The daemon's end. Removes its path when dropped.
#[derive(Debug)]
pub struct SideListener {
    fd: OwnedFd,
    path: PathBuf,
}

impl SideListener {
    /// Listens at `path`, which must not exist, with mode 0660.
    pub fn bind(path: &Path) -> Result<Self, Error> {
        let fd = seqpacket(path)?;
        bind(&fd, &address(path)?).map_err(Error::system("bind", path.display().to_string()))?;
        rustix::fs::chmod(path, Mode::from_raw_mode(0o660))
            .map_err(Error::system("set mode of", path.display().to_string()))?;
        listen(&fd, 64).map_err(Error::system("listen at", path.display().to_string()))?;
        Ok(Self { fd, path: path.to_owned() })
    }

    /// Takes one connection. Would-block is an error that says so.
    pub fn accept(&self) -> Result<SideSocket, Error> {
        let fd = accept_with(&self.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
            .map_err(Error::system("accept at", self.path.display().to_string()))?;
        Ok(SideSocket(fd))
    }
}

impl AsFd for SideListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for SideListener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn seqpacket(path: &Path) -> Result<OwnedFd, Error> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(Error::system("create socket for", path.display().to_string()))
}

fn address(path: &Path) -> Result<SocketAddrUnix, Error> {
    SocketAddrUnix::new(path).map_err(Error::system("use as socket path", path.display().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SharedMemory;

    fn pair() -> (tempfile::TempDir, SideListener, SideSocket, SideSocket) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.fd");
        let listener = SideListener::bind(&path).unwrap();
        let client = SideSocket::connect(&path).unwrap();
        let server = listener.accept().unwrap();
        (dir, listener, client, server)
    }

    #[test]
    fn memory_travels_with_a_packet() {
        let (_dir, _listener, client, server) = pair();
        let memory = SharedMemory::create("test", 4096).unwrap();
        memory.write(0, b"over there");
        server.send(b"Pname", Some(memory.fd())).unwrap();
        let packet = client.receive().unwrap().unwrap();
        assert_eq!(packet.bytes, b"Pname");
        let mapped = SharedMemory::from_fd(packet.fd.unwrap()).unwrap();
        let mut seen = [0; 10];
        mapped.read(0, &mut seen);
        assert_eq!(&seen, b"over there");
    }

    #[test]
    fn nothing_to_read_end_of_file_and_oversize_are_told_apart() {
        let (_dir, _listener, client, server) = pair();
        assert!(server.receive().unwrap_err().is_would_block());
        client.send(&[1; 300], None).unwrap();
        assert!(!server.receive().unwrap_err().is_would_block());
        drop(client);
        assert!(server.receive().unwrap().is_none());
    }

    #[test]
    fn the_peer_is_known_by_the_kernel() {
        let (_dir, _listener, _client, server) = pair();
        assert_eq!(server.peer().unwrap().pid, std::process::id());
        assert!(!server.watch_peer().unwrap().is_dead());
    }
}
