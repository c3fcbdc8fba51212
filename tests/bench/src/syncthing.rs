//! Two nodes of syncthing, which carries files: how a database file that changed comes from one to the other.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;
use tillcast_tests::process::{Process, succeed};
use tillcast_tests::{http, quiet_port, until};

const KEY: (&str, &str) = ("x-api-key", "bench");
const PATIENCE: Duration = Duration::from_secs(60);

/// Two nodes that share a folder, connected, on this machine alone.
pub struct Pair {
    /// Where files are put.
    pub from: Node,
    /// Where they arrive.
    pub to: Node,
}

/// One of them.
pub struct Node {
    dir: TempDir,
    device: String,
    api: String,
    listen: String,
    process: Option<Process>,
}

impl Pair {
    /// Starts both; they know of each other.
    pub fn start() -> Pair {
        let mut pair = Pair { from: Node::new(), to: Node::new() };
        let devices = [&pair.from, &pair.to].map(|n| (n.device.clone(), n.listen.clone()));
        pair.from.start(&devices);
        pair.to.start(&devices);
        let id = &pair.from.device;
        until(PATIENCE, "the nodes are connected", || pair.to.connections()["connections"][id]["connected"] == true);
        pair
    }

    /// Bytes that the receiving side has taken in so far.
    pub fn received(&self) -> u64 {
        self.to.connections()["total"]["inBytesTotal"].as_u64().unwrap()
    }
}

impl Node {
    fn new() -> Node {
        let dir = tillcast_tests::temp_dir("bench");
        let home = dir.path().join("home");
        let syncthing = |args: &[&str]| {
            let mut command = Command::new("syncthing");
            command.args(args).arg("--home").arg(&home).env("HOME", dir.path());
            succeed(&mut command).trim().to_owned()
        };
        syncthing(&["generate"]);
        let device = syncthing(&["--device-id"]);
        std::fs::create_dir_all(dir.path().join("folder/.stfolder")).unwrap();
        let [api, listen] = [quiet_port(), quiet_port()].map(|port| format!("127.0.0.1:{port}"));
        Node { dir, device, api, listen, process: None }
    }

    fn start(&mut self, devices: &[(String, String)]) {
        let peers: String = devices.iter().map(|(id, _)| format!(r#"<device id="{id}"/>"#)).collect();
        let addresses: String = devices
            .iter()
            .map(|(id, at)| format!(r#"<device id="{id}" name="n"><address>tcp://{at}</address></device>"#))
            .collect();
        let config = format!(
            r#"<configuration version="36">
<folder id="files" path="{folder}" type="sendreceive" rescanIntervalS="3600" fsWatcherEnabled="true" fsWatcherDelayS="1">{peers}</folder>
{addresses}
<gui enabled="true" tls="false"><address>{api}</address><apikey>{key}</apikey></gui>
<options><listenAddress>tcp://{listen}</listenAddress><globalAnnounceEnabled>false</globalAnnounceEnabled>
<localAnnounceEnabled>false</localAnnounceEnabled><relaysEnabled>false</relaysEnabled><natEnabled>false</natEnabled>
<startBrowser>false</startBrowser><urAccepted>-1</urAccepted><autoUpgradeIntervalH>0</autoUpgradeIntervalH>
<crashReportingEnabled>false</crashReportingEnabled><reconnectionIntervalS>1</reconnectionIntervalS></options>
</configuration>"#,
            folder = self.dir.path().join("folder").display(),
            api = self.api,
            listen = self.listen,
            key = KEY.1,
        );
        let home = self.dir.path().join("home");
        std::fs::write(home.join("config.xml"), config).unwrap();
        let mut command = Command::new("syncthing");
        command.args(["serve", "--no-browser", "--no-restart", "--no-upgrade", "--home"]).arg(&home);
        command.env("HOME", self.dir.path());
        let mut process = Process::spawn("syncthing", command, &self.dir.path().join("log"));
        let url = format!("http://{}/rest/system/ping", self.api);
        let answers = || http::try_request("GET", &url, &[KEY], b"").is_ok_and(|r| r.status == 200);
        process.wait_until(PATIENCE, "it answers", answers);
        self.process = Some(process);
    }

    /// The path of a file in the shared folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join("folder").join(name)
    }

    /// Puts a finished file under its name, and says so at once rather than wait for its watcher.
    pub fn put(&self, finished: &Path, name: &str) {
        std::fs::rename(finished, self.file(name)).unwrap();
        let url = format!("http://{}/rest/db/scan?folder=files&sub={name}", self.api);
        http::try_request("POST", &url, &[KEY], b"").unwrap().expect_status(200);
    }

    fn connections(&self) -> serde_json::Value {
        http::get_with(&format!("http://{}/rest/system/connections", self.api), &[KEY]).json()
    }
}
