//! Packets with descriptors between two processes: SOCK_SEQPACKET over a Unix socket, SCM_RIGHTS.
//!
//! The connection is also the life line: its end of file says that the peer closed it, which together with
//! [`crate::ProcessWatch`] means that the peer is dead.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::io::{IoSlice, IoSliceMut};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect,
    listen, recv, recvmsg, sendmsg, socket_with, sockopt,
};

use crate::{Error, ProcessWatch};

/// Largest packet, bytes.
const PACKET_BYTES_MAX: usize = 256;
/// Most descriptors in one packet.
const DESCRIPTORS_MAX: usize = 2;

/// One received packet.
#[derive(Debug)]
pub struct Packet {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The descriptor that came with it.
    pub fd: Option<OwnedFd>,
}

/// What one packet with several descriptors brings.
type BytesAndFds = (Vec<u8>, Vec<OwnedFd>);

/// Who is at the other end, as the kernel recorded it when the connection was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Process id.
    pub pid: u32,
    /// User id: the trust domain.
    pub uid: u32,
}

/// What was received, as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// A packet of so many bytes.
    Packet(usize),
    /// End of file.
    End,
    /// Nothing in time.
    Nothing,
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
        match fd {
            Some(fd) => self.send_fds(bytes, &[fd]),
            None => self.send_fds(bytes, &[]),
        }
    }

    /// Sends one packet with up to two descriptors, which arrive in the same order.
    pub fn send_fds(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            let pushed = control.push(SendAncillaryMessage::ScmRights(fds));
            assert!(pushed, "a packet carries at most {DESCRIPTORS_MAX} descriptors");
        }
        sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
            .map_err(Error::system("send on", "side channel"))?;
        Ok(())
    }

    /// Receives one packet that carries at most one descriptor; `None` at end of file. Would-block is an error that
    /// says so.
    pub fn receive(&self) -> Result<Option<Packet>, Error> {
        let Some((bytes, mut fds)) = self.receive_fds()? else { return Ok(None) };
        if fds.len() > 1 {
            return Err(Error::refused("a side channel packet carries too much"));
        }
        Ok(Some(Packet { bytes, fd: fds.pop() }))
    }

    /// Receives one packet with up to two descriptors; `None` at end of file. Would-block is an error that says so.
    pub fn receive_fds(&self) -> Result<Option<BytesAndFds>, Error> {
        let mut bytes = vec![0; PACKET_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received =
            recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC);
        let received = received.map_err(Error::system("receive on", "side channel"))?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(Error::refused("a side channel packet is too long or carries too much"));
        }
        bytes.truncate(received.bytes);
        Ok(Some((bytes, fds)))
    }

    /// Receives one packet without descriptors into `buffer`, on a thread that has nothing else to do: it looks again and
    /// again for `awake`, so that it need not be woken, and sleeps for the rest of `limit`.
    pub fn receive_within(
        &self,
        buffer: &mut [u8],
        awake: Duration,
        limit: Duration,
    ) -> Result<Received, Error> {
        let begun = Instant::now();
        loop {
            match recv(&self.0, &mut *buffer, RecvFlags::TRUNC) {
                Ok((_, 0)) => return Ok(Received::End),
                Ok((_, bytes)) if bytes > buffer.len() => {
                    return Err(Error::refused(format!(
                        "a packet has {bytes} bytes, at most {} fit",
                        buffer.len()
                    )));
                }
                Ok((_, bytes)) => return Ok(Received::Packet(bytes)),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(Error::system("receive on", "side channel")(errno)),
            }
            let waited = begun.elapsed();
            if waited >= limit {
                return Ok(Received::Nothing);
            }
            if waited < awake {
                std::hint::spin_loop();
            } else {
                self.wait_readable(limit - waited)?;
            }
        }
    }

    /// Waits until there is something to receive, an end of file included; false if nothing came in time.
    pub fn wait_readable(&self, limit: Duration) -> Result<bool, Error> {
        Ok(!self.poll(PollFlags::IN, limit)?.is_empty())
    }

    /// Waits until there is room for a packet, or nobody to read it; false if neither came in time.
    pub fn wait_writable(&self, limit: Duration) -> Result<bool, Error> {
        Ok(!self.poll(PollFlags::OUT, limit)?.is_empty())
    }

    /// True once the peer will send nothing more. What it sent before can still be received.
    pub fn is_hung_up(&self) -> Result<bool, Error> {
        let seen = self.poll(PollFlags::RDHUP, Duration::ZERO)?;
        Ok(seen.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR))
    }

    /// What of `wanted` is true of the socket, or became true in time. A signal ends the wait early.
    fn poll(&self, wanted: PollFlags, limit: Duration) -> Result<PollFlags, Error> {
        let limit = Timespec::try_from(limit).map_err(|_| Error::refused("nobody waits that long"))?;
        let mut fds = [PollFd::new(&self.0, wanted)];
        match poll(&mut fds, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(fds[0].revents()),
            Err(errno) => Err(Error::system("wait for", "side channel")(errno)),
        }
    }

    /// The same connection through a descriptor of its own.
    pub fn try_clone(&self) -> Result<Self, Error> {
        let fd = rustix::io::fcntl_dupfd_cloexec(&self.0, 0);
        fd.map(Self).map_err(Error::system("duplicate", "side channel"))
    }

    /// Ends both directions, as if the socket were closed: the peer sees end of file.
    pub fn hang_up(&self) {
        // Fails only if the peer is gone already.
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
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
    fn packets_are_received_awake_or_asleep_and_in_time_or_not() {
        let (_dir, _listener, client, server) = pair();
        let (awake, asleep, long) = (Duration::from_secs(60), Duration::ZERO, Duration::from_secs(60));
        let mut buffer = [0; 1000];
        assert_eq!(
            server.receive_within(&mut buffer, asleep, Duration::from_millis(5)).unwrap(),
            Received::Nothing
        );
        for awake in [awake, asleep] {
            let sender = client.try_clone().unwrap();
            let later = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(5));
                sender.send(&[7; 900], None).unwrap();
            });
            assert_eq!(server.receive_within(&mut buffer, awake, long).unwrap(), Received::Packet(900));
            assert_eq!(buffer[..900], [7; 900]);
            later.join().unwrap();
        }
        client.send(&[1; 1001], None).unwrap();
        assert!(server.receive_within(&mut buffer, awake, long).is_err());
        client.hang_up();
        assert_eq!(server.receive_within(&mut buffer, asleep, long).unwrap(), Received::End);
    }

    #[test]
    fn two_descriptors_arrive_in_order_and_where_one_is_expected_they_are_refused() {
        let (_dir, _listener, client, server) = pair();
        let (first, second) =
            (SharedMemory::create("first", 4096).unwrap(), SharedMemory::create("second", 8192).unwrap());
        client.send_fds(b"K", &[first.fd(), second.fd()]).unwrap();
        let (bytes, fds) = server.receive_fds().unwrap().unwrap();
        assert_eq!(bytes, b"K");
        let sizes: Vec<usize> =
            fds.into_iter().map(|fd| SharedMemory::from_fd(fd).unwrap().bytes()).collect();
        assert_eq!(sizes, [4096, 8192]);
        client.send_fds(b"K", &[first.fd(), second.fd()]).unwrap();
        let refused = server.receive().unwrap_err();
        assert!(matches!(refused, Error::Refused { .. }), "{refused}");
    }

    #[test]
    fn waiting_ends_with_a_packet_or_with_the_peer() {
        let (_dir, _listener, client, server) = pair();
        assert!(!server.wait_readable(Duration::ZERO).unwrap());
        assert!(!server.is_hung_up().unwrap());
        client.send(b"last words", None).unwrap();
        assert!(server.wait_readable(Duration::from_secs(10)).unwrap());
        client.hang_up();
        assert!(server.is_hung_up().unwrap());
        assert_eq!(server.receive().unwrap().unwrap().bytes, b"last words");
        assert!(server.receive().unwrap().is_none());
        assert!(server.wait_writable(Duration::from_secs(10)).unwrap(), "a send would fail at once");
    }

    #[test]
    fn the_peer_is_known_by_the_kernel() {
        let (_dir, _listener, _client, server) = pair();
        assert_eq!(server.peer().unwrap().pid, std::process::id());
        assert!(!server.watch_peer().unwrap().is_dead());
    }
}
