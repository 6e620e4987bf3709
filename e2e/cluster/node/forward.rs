//! forward LISTEN NAMESPACE TARGET: listens where it is started, connects in another network namespace.
//!
//! So programs of the machine reach a server inside without an address, a route or a firewall rule on the machine.

use std::fs::File;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::thread;

const CLONE_NEWNET: i32 = 0x4000_0000;

unsafe extern "C" {
    fn setns(descriptor: i32, kind: i32) -> i32;
}

/// Copies until `from` ends. An orderly end is passed on; a broken connection breaks both, so that neither side waits for
/// an answer that cannot come: a client has to see that its API server died.
fn copy(mut from: TcpStream, mut to: TcpStream) {
    let copied = io::copy(&mut from, &mut to);
    // Errors of shutdown mean that the connection is gone already, which is what is wanted.
    if copied.is_ok() {
        let _ = to.shutdown(Shutdown::Write);
    } else {
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    }
}

fn forward(client: TcpStream, target: &str) -> io::Result<()> {
    let server = TcpStream::connect(target)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (client_too, server_too) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || copy(client_too, server_too));
    copy(server, client);
    Ok(())
}

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [listen, namespace, target] = arguments.as_slice() else {
        eprintln!("usage: forward LISTEN NAMESPACE TARGET");
        std::process::exit(2);
    };
    // The socket stays in this namespace; the process moves before it has a second thread.
    let listener = TcpListener::bind(listen)?;
    let namespace = File::open(namespace)?;
    // SAFETY: the descriptor is open, and the call touches no memory of ours.
    if unsafe { setns(namespace.as_raw_fd(), CLONE_NEWNET) } != 0 {
        return Err(io::Error::last_os_error());
    }
    for client in listener.incoming() {
        let target = target.clone();
        // One connection that could not be accepted says nothing about the next.
        thread::spawn(move || {
            if let Err(error) = client.and_then(|client| forward(client, &target)) {
                eprintln!("{target}: {error}");
            }
        });
    }
    Ok(())
}
