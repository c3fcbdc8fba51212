//! nginx over a directory, as a CDN or as the rival in a benchmark.

use super::{make_certificates, ready, with_free_port};
use crate::http;
use crate::process::{Process, command, program};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A static web server with sendfile; one worker a core.
#[derive(Debug)]
pub struct Nginx {
    _process: Process,
    port: u16,
    tls: Option<u16>,
    dir: TempDir,
}

impl Nginx {
    /// Serves `root`.
    #[track_caller]
    pub fn serve(root: &Path) -> Nginx {
        Nginx::with(root, "")
    }

    /// Serves `root` with more directives inside `location /`, e.g. `limit_rate 200k;`.
    #[track_caller]
    pub fn with(root: &Path, location: &str) -> Nginx {
        Nginx::start(root, location, None)
    }

    /// Serves `root` over TLS too, by a certificate for these names of an authority that nobody knows.
    #[track_caller]
    pub fn tls(root: &Path, names: &str) -> Nginx {
        Nginx::start(root, "", Some(names))
    }

    #[track_caller]
    fn start(root: &Path, location: &str, tls: Option<&str>) -> Nginx {
        let dir = crate::temp_dir("nginx");
        if let Some(names) = tls {
            make_certificates(dir.path(), names);
        }
        let root = root.canonicalize().unwrap_or_else(|e| panic!("{}: {e}", root.display()));
        let log = dir.path().join("log");
        let ((process, tls), port) = with_free_port(|port| {
            let path = dir.path().join("nginx.conf");
            let tls = tls.map(|_| crate::quiet_port());
            std::fs::write(&path, config(dir.path(), &root, (port, tls), location)).unwrap();
            let mut server = command(&program("nginx"), None, "TERM");
            server.arg("-p").arg(dir.path()).arg("-c").arg(&path).arg("-e").arg(dir.path().join("error.log"));
            let mut process = Process::spawn("nginx", server, &log);
            let url = format!("http://127.0.0.1:{port}/-/up");
            ready(&mut process, "nginx", || http::try_get(&url).is_some_and(|r| r.status == 204))?;
            Ok(((process, tls), port))
        });
        Nginx { _process: process, port, tls, dir }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// `https://127.0.0.1:PORT`.
    #[track_caller]
    pub fn tls_url(&self) -> String {
        format!("https://127.0.0.1:{}", self.tls.expect("it serves no TLS"))
    }

    /// The certificate of the authority.
    pub fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.crt")
    }

    /// The requests so far: `METHOD PATH STATUS BYTES RANGE` a line.
    pub fn requests(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.path().join("access.log")).unwrap_or_default();
        text.lines().filter(|l| !l.contains("/-/up ")).map(str::to_owned).collect()
    }
}

fn config(dir: &Path, root: &Path, (port, tls): (u16, Option<u16>), location: &str) -> String {
    let (dir, root) = (dir.display(), root.display());
    let tls = tls.map_or_else(String::new, |port| {
        format!("listen 127.0.0.1:{port} ssl; ssl_certificate {dir}/server.crt; ssl_certificate_key {dir}/server.key;")
    });
    // Files that a test reads stay its own: root's workers stay root.
    let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
    format!(
        "{user} daemon off; master_process on; worker_processes auto; pid {dir}/pid; error_log {dir}/error.log;
        events {{ worker_connections 1024; }}
        http {{
            sendfile on; tcp_nopush on; keepalive_requests 1000000; etag on;
            client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2; fastcgi_temp_path {dir}/t3; uwsgi_temp_path {dir}/t4; scgi_temp_path {dir}/t5;
            types {{ application/json json; application/gzip pack; }}
            log_format short '$request_method $request_uri $status $body_bytes_sent $http_range';
            access_log {dir}/access.log short;
            server {{
                listen 127.0.0.1:{port}; {tls}
                root \"{root}\";
                location = /-/up {{ return 204; }}
                location / {{ {location} }}
            }}
        }}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serves_files_with_ranges_and_etags() {
        let root = crate::temp_dir("root");
        std::fs::write(root.path().join("a.pack"), b"0123456789").unwrap();
        let nginx = Nginx::serve(root.path());
        let url = format!("{}/a.pack", nginx.url());
        let whole = http::get(&url).expect_status(200);
        assert_eq!(whole.header("content-type"), "application/gzip");
        http::get_with(&url, &[("if-none-match", whole.header("etag"))]).expect_status(304);
        assert_eq!(http::get_with(&url, &[("range", "bytes=7-")]).expect_status(206).body, b"789");
        // The log is written after the answer.
        crate::until(crate::PATIENCE, "three lines in the log", || nginx.requests().len() == 3);
    }
}
