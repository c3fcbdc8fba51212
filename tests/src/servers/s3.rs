//! Object storage: two real S3 servers, one that keeps conditions (moto) and one that ignores them (s3rver),
//! and a stand-in on a directory whose answers a test chooses.

use super::{ready, with_free_port};
use crate::process::{self, Process};
use crate::{http, tools};
use sha2::{Digest as _, Sha256};
use std::path::PathBuf;
use std::process::Command;
use tempfile::TempDir;

mod stand_in;
pub use stand_in::{Conditions, Request, StandIn};

/// A program of the Python environment that `tests/run` made.
#[track_caller]
pub(super) fn venv(name: &str) -> PathBuf {
    let path = tools().join("venv/bin").join(name);
    assert!(path.exists(), "{} is missing: run tests/run --setup once", path.display());
    path
}

/// A real S3 server with one bucket, `packs`.
#[derive(Debug)]
pub struct S3 {
    _process: Process,
    port: u16,
    keys: (&'static str, &'static str),
    _dir: TempDir,
}

impl S3 {
    /// moto: If-Match and If-None-Match on PUT are kept, also when many race.
    #[track_caller]
    pub fn moto() -> S3 {
        let dir = crate::temp_dir("moto");
        let (process, port) = with_free_port(|port| {
            let mut server = process::command(&venv("moto_server"), None, "KILL");
            server.args(["-H", "127.0.0.1", "-p", &port.to_string()]).current_dir(dir.path());
            let mut process = Process::spawn("moto", server, &dir.path().join("log"));
            let url = format!("http://127.0.0.1:{port}/moto-api/data.json");
            ready(&mut process, "moto", || http::try_get(&url).is_some_and(|r| r.status == 200))?;
            Ok((process, port))
        });
        http::put(&format!("http://127.0.0.1:{port}/packs"), &[], b"").expect_status(200);
        S3 { _process: process, port, keys: ("test", "testtest"), _dir: dir }
    }

    /// s3rver: conditions on PUT are ignored without a word.
    #[track_caller]
    pub fn ignoring_conditions() -> S3 {
        let dir = crate::temp_dir("s3rver");
        let script = tools().join("s3rver/node_modules/s3rver/bin/s3rver.js");
        assert!(script.exists(), "{} is missing: run tests/run --setup once", script.display());
        let (process, port) = with_free_port(|port| {
            let mut server = process::command(&process::program("node"), None, "KILL");
            server.arg(&script).arg("-d").arg(dir.path().join("data"));
            server
                .args(["-a", "127.0.0.1", "-p", &port.to_string(), "--configure-bucket", "packs"])
                .current_dir(dir.path());
            let mut process = Process::spawn("s3rver", server, &dir.path().join("log"));
            let url = format!("http://127.0.0.1:{port}/packs");
            ready(&mut process, "s3rver", || http::try_get(&url).is_some_and(|r| r.status == 200))?;
            Ok((process, port))
        });
        S3 { _process: process, port, keys: ("S3RVER", "S3RVER"), _dir: dir }
    }

    /// `http://127.0.0.1:PORT`: the `endpoint` of `[objects.s3]`.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The bucket.
    pub fn bucket(&self) -> &'static str {
        "packs"
    }

    /// The keys, as environment variables for the product's commands.
    pub fn env(&self) -> [(&'static str, &'static str); 2] {
        [("AWS_ACCESS_KEY_ID", self.keys.0), ("AWS_SECRET_ACCESS_KEY", self.keys.1)]
    }

    /// An object's bytes; None if there is none.
    #[track_caller]
    pub fn get(&self, key: &str) -> Option<Vec<u8>> {
        let (status, body) = self.signed("GET", key, &[], b"");
        assert!(status == 200 || status == 404, "GET {key}: {status}");
        (status == 200).then_some(body)
    }

    /// Puts an object behind the publisher's back.
    #[track_caller]
    pub fn put(&self, key: &str, body: &[u8]) {
        assert_eq!(self.signed("PUT", key, &[], body).0, 200, "PUT {key}");
    }

    /// Deletes an object behind the publisher's back.
    #[track_caller]
    pub fn delete(&self, key: &str) {
        assert_eq!(self.signed("DELETE", key, &[], b"").0, 204, "DELETE {key}");
    }

    /// A call signed by curl, which shares nothing with the product's client: status and body.
    #[track_caller]
    pub fn signed(&self, method: &str, key: &str, headers: &[&str], body: &[u8]) -> (u16, Vec<u8>) {
        let (input, output) = (tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap());
        std::fs::write(input.path(), body).unwrap();
        let mut curl = Command::new(process::program("curl"));
        curl.args([
            "-sS",
            "--path-as-is",
            "--noproxy",
            "*",
            "--aws-sigv4",
            "aws:amz:us-east-1:s3",
            "-w",
            "%{http_code}",
            "-X",
            method,
            "-o",
        ]);
        curl.arg(output.path()).args(["--user", &format!("{}:{}", self.keys.0, self.keys.1)]);
        let hash: String = Sha256::digest(body).iter().map(|b| format!("{b:02x}")).collect();
        curl.args(["-H", &format!("x-amz-content-sha256: {hash}"), "-H", "content-type: application/octet-stream"]);
        for header in headers {
            curl.args(["-H", header]);
        }
        if method == "PUT" {
            curl.arg("--data-binary").arg(format!("@{}", input.path().display()));
        }
        let status = process::succeed(curl.arg(format!("{}/packs/{key}", self.endpoint())));
        (status.trim().parse().unwrap(), std::fs::read(output.path()).unwrap())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The status of a second create-only PUT of a key, and what is there after it.
    fn second_create(s3: &S3) -> (u16, Vec<u8>) {
        let create = ["if-none-match: *"];
        assert_eq!(s3.signed("PUT", "a/b", &create, b"one").0, 200);
        let status = s3.signed("PUT", "a/b", &create, b"two").0;
        (status, s3.get("a/b").unwrap())
    }

    #[test]
    fn moto_keeps_conditions() {
        let s3 = S3::moto();
        assert_eq!(second_create(&s3), (412, b"one".to_vec()));
        s3.put("a/b", b"three");
        s3.delete("a/b");
        assert_eq!(s3.get("a/b"), None);
    }

    #[test]
    fn s3rver_ignores_conditions() {
        assert_eq!(second_create(&S3::ignoring_conditions()), (200, b"two".to_vec()));
    }

    #[test]
    fn the_stand_in_answers_501_to_conditions() {
        let oss = StandIn::start(Conditions::Refused);
        let url = format!("{}/packs/a/b", oss.endpoint());
        http::put(&url, &[("if-none-match", "*")], b"one").expect_status(501);
        http::put(&url, &[], b"one").expect_status(200);
        assert_eq!(http::get_with(&url, &[("range", "bytes=1-")]).expect_status(206).body, b"ne");
        assert!(
            http::get(&format!("{}/packs?list-type=2&prefix=a/", oss.endpoint())).text().contains("<Key>a/b</Key>")
        );
        for (conditions, status) in [(Conditions::Kept, 412), (Conditions::Ignored, 200)] {
            let other = StandIn::start(conditions);
            let url = format!("{}/packs/a", other.endpoint());
            http::put(&url, &[("if-none-match", "*")], b"one").expect_status(200);
            http::put(&url, &[("if-none-match", "*")], b"two").expect_status(status);
        }
        oss.fail_next(503, 1);
        http::get(&url).expect_status(503);
        http::get(&url).expect_status(200);
        http::delete(&url).expect_status(204);
        http::get(&url).expect_status(404);
    }
}
