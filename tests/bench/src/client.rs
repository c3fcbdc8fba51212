//! A client with one connection, as cheap as can be: the machine is shared with the server.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

/// One connection, kept.
pub struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    /// Connects.
    pub fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        Client { stream, buffer: vec![0; 256 << 10] }
    }

    /// Sends a request and reads its answer, which must be a 200 of a told length; that length.
    pub fn ask(&mut self, request: &[u8]) -> u64 {
        self.stream.write_all(request).unwrap();
        let mut have = 0;
        let head = loop {
            let n = self.stream.read(&mut self.buffer[have..]).unwrap();
            assert!(n > 0, "the server closes: {}", String::from_utf8_lossy(&self.buffer[..have]));
            have += n;
            if let Some(end) = self.buffer[..have].windows(4).position(|w| w == b"\r\n\r\n") {
                break end + 4;
            }
        };
        let text = std::str::from_utf8(&self.buffer[..head]).unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        let length =
            text.lines().find_map(|l| l.split_once(": ").filter(|(n, _)| n.eq_ignore_ascii_case("content-length")));
        let length: u64 = length.and_then(|(_, n)| n.parse().ok()).unwrap_or_else(|| panic!("no length: {text}"));
        let mut body = (have - head) as u64;
        while body < length {
            let n = self.stream.read(&mut self.buffer).unwrap();
            assert!(n > 0, "a short body");
            body += n as u64;
        }
        assert_eq!(body, length, "the body's length");
        length
    }
}
