//! What is explored: one command of a real binary each, on a small site made ready for it.

use crate::bench::{Bench, Digests};
use crate::check::{MIRROR, Owed, REGISTER, STICK, STORE, World, agent_db, bucket_manifest, relay_db, stream_of};
use crate::disk::{Image, image_of};
use crate::trace::{self, Recording};
use serde_json::json;
use std::any::Any;
use std::os::unix::fs::PermissionsExt as _;
use tillcast_tests::site::{Builder, Node};
use tillcast_tests::{Nginx, Output, PATIENCE, Product, Site, forge, wait_for};

/// What a command that ended well has told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The bucket promises what the source has.
    Published,
    /// The replica is at the head.
    AtHead(String),
    /// The device is enrolled.
    Enrolled(String),
    /// Headquarters knows the device.
    Known(String),
    /// The key that signed before is trusted no more.
    Rotated,
    /// What lies on the stick now is to be carried.
    Carried,
    /// One more mail is in the outbox.
    Mailed,
    /// Nothing but what was so before.
    Nothing,
}

/// A command about to be run.
#[derive(Debug)]
pub struct Scene {
    /// Its name.
    pub name: &'static str,
    /// Where.
    pub site: Site,
    /// Whose command it is.
    pub product: Product,
    /// What is run.
    pub args: Vec<String>,
    /// The directories that it may change.
    pub watched: Vec<String>,
    /// The directory of whoever a service serves.
    pub clients: Vec<String>,
    /// What headquarters ever said.
    pub world: World,
    /// What a good end tells.
    pub end: End,
    /// The exit code of a run that nothing disturbs.
    pub code: i32,
    _servers: Vec<Box<dyn Any + Send + Sync>>,
}

type Maker = fn(bool) -> Scene;

/// All scenes. The argument of a maker: whether the command will be run many times on copies of the same state, so
/// that whoever it talks to must remember nothing.
pub const SCENES: [(&str, Maker); 20] = [
    ("publish-first", |_| publish(false, &["publish"])),
    ("publish-delta", |_| publish(true, &["publish"])),
    ("publish-full", |_| publish(true, &["publish", "--full"])),
    ("publish-mirrored", |_| publish_mirrored()),
    ("hq-rotates", |_| hq_rotates()),
    ("export", |_| export()),
    ("relay-first", |_| relay("relay-first", &[], false)),
    ("relay-delta", |_| relay("relay-delta", &["publish"], true)),
    ("relay-full", |_| relay("relay-full", &["publish", "--full"], true)),
    ("relay-refuses", |_| relay_refuses()),
    ("relay-serves", |_| relay_serves()),
    ("import", |_| import()),
    ("register-first", |many| register("register-first", many, false)),
    ("register-delta", |many| register("register-delta", many, true)),
    ("register-heals", register_heals),
    ("enrol-relay", |_| enrol(STORE)),
    ("enrol-register", |_| enrol(REGISTER)),
    ("hq-enrols", |_| hq_enrols()),
    ("hq-refuses", |_| hq_refuses()),
    ("hq-serves", |_| hq_serves()),
];

const STREAMS: [(&str, &[&str]); 4] =
    [("catalog", &["item", "barcode"]), ("price", &["price"]), ("promo", &["promo"]), ("staff", &["staff"])];

/// An empty site with its world.
fn begin(enrolled: bool) -> (Site, World) {
    begin_with(enrolled, |builder| builder)
}

fn begin_with(enrolled: bool, settings: impl FnOnce(Builder) -> Builder) -> (Site, World) {
    let builder = settings(Site::builder().stores(&[(STORE, "east")]).registers(1).items(24));
    let site = if enrolled { builder.build() } else { builder.prepare() };
    let mut world = World::default();
    if enrolled {
        trusts(&site, &mut world);
    }
    (site, world)
}

fn trusts(site: &Site, world: &mut World) {
    world.root = Some(site.signing_key("root").verifying_key());
    world.publishers = vec![site.signing_key("publisher").verifying_key()];
}

/// The source's contents become known to the world.
fn expect(site: &Site, world: &mut World) {
    let now = site.expected(STORE);
    for (stream, tables) in STREAMS {
        let digests: Digests = tables.iter().map(|t| ((*t).to_owned(), now[*t].clone())).collect();
        world.contents.entry(stream.to_owned()).or_default().push(digests);
    }
}

fn publish_known(site: &Site, world: &mut World, args: &[&str]) {
    expect(site, world);
    site.hq.run(args).ok();
    world.learn(&site.object(&format!("stores/{STORE}/manifest.json")).unwrap(), &site.expected(STORE));
}

fn change(site: &Site, n: usize) {
    site.sql(&format!(
        "UPDATE price SET price_cents = price_cents + {n} WHERE sku < 'SKU0000007';
         UPDATE staff SET name = 'v{n}' WHERE id = 2;
         DELETE FROM promo WHERE id = 1; INSERT INTO promo VALUES ('east', 90 + {n}, 'SKU0000002', 9);
         INSERT INTO item VALUES ('N{n}', 'new', 3, 0.5, NULL); DELETE FROM item WHERE sku = 'SKU000000{n}'"
    ));
}

impl Scene {
    fn new(name: &'static str, product: Product, args: &[&str], site: Site, world: World) -> Scene {
        let watched: &[&str] = match product {
            Product::Hq => &["hq", "objects"],
            Product::Relay => &["relay-0421"],
            Product::Agent => &["register-0421-01"],
        };
        let clients: &[&str] = match (product, args) {
            (Product::Hq, ["serve"]) => &["relay-0421"],
            (Product::Relay, ["run"]) => &["register-0421-01"],
            _ => &[],
        };
        Scene {
            name,
            site,
            product,
            clients: clients.iter().map(|c| (*c).to_owned()).collect(),
            args: args.iter().map(|a| (*a).to_owned()).collect(),
            watched: watched.iter().map(|w| (*w).to_owned()).collect(),
            world,
            end: End::Nothing,
            code: 0,
            _servers: Vec::new(),
        }
    }

    /// Whose command it is.
    pub fn node(&self) -> &Node {
        match self.product {
            Product::Hq => &self.site.hq,
            Product::Relay => self.site.relay(STORE),
            Product::Agent => self.site.register(REGISTER),
        }
    }

    /// Its files, as they are.
    pub fn image(&self) -> Image {
        image_of(self.site.dir(), &self.watched)
    }

    /// Puts a state in place of its files.
    pub fn restore(&self, image: &Image) {
        self.put_back(&self.watched, image);
    }

    /// Puts a state in place of the files of some directories.
    pub fn put_back(&self, dirs: &[String], image: &Image) {
        for dir in dirs {
            let _ = std::fs::remove_dir_all(self.site.dir().join(dir));
            std::fs::create_dir_all(self.site.dir().join(dir)).unwrap();
        }
        for (path, blob) in image {
            let path = self.site.dir().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &blob.bytes).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
    }

    /// Runs the command once more, as whoever finds the site would.
    pub fn again(&self) -> Output {
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        match args[..] {
            ["run"] => self.node().run(&["once"]),
            ["serve"] => self.serve_again(),
            _ => self.node().run(&args),
        }
    }

    /// Headquarters' service, until it answers and a relay has come: its output, without an exit code where it does not.
    fn serve_again(&self) -> Output {
        let mut service = self.node().spawn(&["serve"], &[]);
        let url = format!("{}/healthz", self.node().url());
        let answers = wait_for(PATIENCE, || {
            let answers = tillcast_tests::http::try_get(&url).is_some_and(|r| r.status == 200);
            (answers || !service.process.is_running()).then_some(answers)
        });
        if answers == Some(true) {
            self.site.relay(STORE).run(&["once"]);
        }
        service.process.signal(rustix::process::Signal::TERM);
        let out = service.finish(PATIENCE);
        Output { code: out.code.filter(|_| answers == Some(true)), ..out }
    }

    /// Runs the command under strace to its good end.
    #[track_caller]
    pub fn record(&mut self) -> Recording {
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        let recording = if self.is_service() { self.record_service() } else { trace::record(self.node(), &args, &[]) };
        let text = String::from_utf8_lossy(&recording.output.stderr);
        assert_eq!(recording.output.status.code(), Some(self.code), "{}: {text}", self.name);
        if self.end == End::Rotated {
            let trust = self.site.dir().join("objects/trust");
            let files = std::fs::read_dir(trust).unwrap().map(|e| std::fs::read(e.unwrap().path()).unwrap());
            self.world.meet(&files.collect::<Vec<_>>());
        }
        if self.end == End::Published {
            let manifest = std::fs::read(self.site.dir().join(bucket_manifest())).unwrap();
            self.world.learn(&manifest, &self.site.expected(STORE));
        }
        recording
    }

    /// Whether it runs until it is told to end.
    pub fn is_service(&self) -> bool {
        matches!(self.args[0].as_str(), "run" | "serve")
    }

    /// The service, while whoever it serves comes some times.
    fn record_service(&self) -> Recording {
        let log = tempfile::NamedTempFile::new().unwrap();
        let node = self.node();
        let command = trace::strace(node, &[self.args[0].as_str()], &trace::recorded(&[]), log.path());
        let mut strace =
            { command }.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
        self.serve(|| false);
        assert!(self.has_served(), "{}: who it serves has not what there is", self.name);
        trace::terminate(strace.id());
        let status = strace.wait().unwrap();
        let output = std::process::Output { status, stdout: Vec::new(), stderr: Vec::new() };
        trace::finish(&node.dir, log.path(), output)
    }

    /// Whoever the service serves comes, until he has what there is, or nothing more is to be awaited.
    pub fn serve(&self, over: impl Fn() -> bool) {
        let url = format!("{}/healthz", self.node().url());
        let answers = || tillcast_tests::http::try_get(&url).is_some_and(|r| r.status == 200);
        let _ = wait_for(PATIENCE / 3, || (over() || answers()).then_some(()));
        match self.product {
            Product::Hq => (0..4).filter(|_| !over()).for_each(|_| drop(self.site.relay(STORE).run(&["once"]))),
            _ => {
                let register = self.site.register(REGISTER);
                let comes = || {
                    register.run(&["once"]);
                    self.has_served()
                };
                let _ = wait_for(PATIENCE / 3, || (over() || comes()).then_some(()));
                if !over() {
                    register.run(&["once"]);
                }
            }
        }
    }

    /// Whether whoever the service serves has what there is.
    pub fn has_served(&self) -> bool {
        let register = || self.site.register(REGISTER);
        !self.is_service()
            || self.product != Product::Relay
            || self.world.head.iter().all(|(i, v)| register().version(i) == Some(*v))
    }

    /// What is owed after a good end.
    pub fn ended(&self, owed: &mut Owed) {
        match &self.end {
            End::Published => {
                owed.published = true;
                owed.even.extend(self.watched.iter().any(|dir| *dir == "mirror").then_some(MIRROR));
            }
            End::AtHead(path) => {
                owed.at_head(&self.world, path);
                owed.healed = true;
            }
            End::Enrolled(path) => drop(owed.serials.entry(path.clone()).or_default()),
            End::Rotated => (owed.rotated, owed.is_sole) = (true, true),
            End::Known(id) => drop(owed.devices.insert(id.clone())),
            End::Mailed => owed.mails += 1,
            End::Carried => drop(owed.even.insert(STICK)),
            End::Nothing => {}
        }
        owed.told += 1;
    }

    /// What is owed before.
    #[track_caller]
    pub fn owed(&self, image: &Image, bench: &mut Bench) -> Owed {
        Owed::of(&self.world, image, bench)
    }
}

fn publish(again: bool, args: &[&str]) -> Scene {
    let name = match (again, args.len()) {
        (false, _) => "publish-first",
        (true, 1) => "publish-delta",
        _ => "publish-full",
    };
    let (site, mut world) = begin(true);
    if again {
        publish_known(&site, &mut world, &["publish"]);
        change(&site, 1);
    }
    expect(&site, &mut world);
    Scene { end: End::Published, ..Scene::new(name, Product::Hq, args, site, world) }
}

/// A mirror takes part that has nothing yet.
fn publish_mirrored() -> Scene {
    let mut scene = publish(true, &["publish"]);
    let urls = ["objects", "mirror"].map(|dir| format!("'file://{}'", scene.site.dir().join(dir).display()));
    scene.site.hq.set("objects.urls", &format!("[{}]", urls.join(", ")));
    std::fs::create_dir(scene.site.dir().join("mirror")).unwrap();
    scene.watched.push("mirror".into());
    Scene { name: "publish-mirrored", ..scene }
}

fn hq_rotates() -> Scene {
    let (site, mut world) = begin(true);
    publish_known(&site, &mut world, &["publish"]);
    Scene { end: End::Rotated, ..Scene::new("hq-rotates", Product::Hq, &["trust", "rotate"], site, world) }
}

/// Onto a stick with an older export.
fn export() -> Scene {
    let (site, mut world) = begin(true);
    publish_known(&site, &mut world, &["publish"]);
    let stick = site.dir().join("stick");
    std::fs::create_dir(&stick).unwrap();
    let args = ["export", "--store", STORE, stick.to_str().unwrap()];
    site.hq.run(&args).ok();
    change(&site, 1);
    publish_known(&site, &mut world, &["publish"]);
    let mut scene = Scene::new("export", Product::Hq, &args, site, world);
    scene.watched.push("stick".into());
    Scene { end: End::Carried, ..scene }
}

fn relay(name: &'static str, news: &[&str], again: bool) -> Scene {
    let (site, mut world) = begin(true);
    publish_known(&site, &mut world, &["publish"]);
    // With a full each time, the one that the relay has is listed no more: it proves the next one aside.
    let rounds = if news.len() > 1 { 2 } else { usize::from(again) };
    for n in 1..=rounds {
        site.relay(STORE).run(&["once"]).ok();
        change(&site, n);
        publish_known(&site, &mut world, news);
    }
    Scene { end: End::AtHead(relay_db("shadow")), ..Scene::new(name, Product::Relay, &["once"], site, world) }
}

/// The third try of a pack whose digest is wrong.
fn relay_refuses() -> Scene {
    let (site, mut world) = begin(true);
    publish_known(&site, &mut world, &["publish"]);
    let relay = site.relay(STORE);
    relay.run(&["once"]).ok();
    let (_, full) = site.head_pack(STORE, "price");
    let mut header: serde_json::Value = serde_json::from_str(&forge::unpack(&full)[0]).unwrap();
    (header["base"], header["version"], header["kind"]) = (json!(1), json!(2), json!("delta"));
    let section = json!({"table": "price", "op": "update", "columns": ["sku", "price_cents"]});
    let trailer = format!(r#"{{"rows":{{"delete":0,"update":1,"insert":0}},"digests":{{"price":"{:032x}"}}}}"#, 7);
    let pack =
        forge::pack(&[header.to_string(), section.to_string(), json!(["SKU0000001", 4242]).to_string(), trailer]);
    site.publish_forged(STORE, "price", &pack);
    world.packs.insert("price@zone-east/0000000002.delta.pack".into(), forge::sha256(&pack));
    for _ in 0..2 {
        relay.run(&["once"]).code(3);
    }
    Scene { code: 3, ..Scene::new("relay-refuses", Product::Relay, &["once"], site, world) }
}

fn relay_serves() -> Scene {
    let mut scene = relay("relay-serves", &["publish"], true);
    scene.site.registers.get_mut(REGISTER).unwrap().set("fallback", "[]");
    scene.args = vec!["run".into()];
    scene.clients = vec!["register-0421-01".into()];
    scene.end = End::AtHead(relay_db("shadow"));
    scene
}

fn import() -> Scene {
    let (mut site, mut world) = begin(true);
    site.relays.get_mut(STORE).unwrap().set("sources", "['file:///nonexistent/bucket']");
    publish_known(&site, &mut world, &["publish"]);
    let stick = site.dir().join("stick");
    std::fs::create_dir(&stick).unwrap();
    site.hq.run(&["export", "--store", STORE, stick.to_str().unwrap()]).ok();
    let args = ["import", stick.to_str().unwrap()];
    let mut scene = Scene::new("import", Product::Relay, &args, site, world);
    scene.watched.push("stick".into());
    Scene { end: End::AtHead(relay_db("shadow")), ..scene }
}

fn register(name: &'static str, many: bool, again: bool) -> Scene {
    let (mut site, mut world) = begin(true);
    publish_known(&site, &mut world, &["publish"]);
    let mut servers: Vec<Box<dyn Any + Send + Sync>> = Vec::new();
    if many {
        let bucket = Nginx::serve(&site.bucket());
        site.registers.get_mut(REGISTER).unwrap().set_text("relay", &bucket.url());
        servers.push(Box::new(bucket));
    }
    site.registers.get_mut(REGISTER).unwrap().set("fallback", "[]");
    site.relay(STORE).run(&["once"]).ok();
    if again {
        if many {
            drop(site.register(REGISTER).run(&["once"]).ok())
        } else {
            site.bring_down()
        }
        change(&site, 1);
        publish_known(&site, &mut world, &["publish"]);
        site.relay(STORE).run(&["once"]).ok();
    }
    if !many {
        servers.push(Box::new(site.relay(STORE).start_ready()));
    }
    let scene = Scene::new(name, Product::Agent, &["once"], site, world);
    Scene { end: End::AtHead(agent_db("store")), _servers: servers, ..scene }
}

/// A row changed by hand: the next cycle heals the stream by a full.
fn register_heals(many: bool) -> Scene {
    let scene = register("register-heals", many, true);
    scene.node().run(&["once"]).ok();
    let db = rusqlite::Connection::open(scene.site.dir().join(agent_db("store"))).unwrap();
    db.execute_batch("UPDATE price SET price_cents = 1 WHERE sku = 'SKU0000003'").unwrap();
    drop(db);
    scene.node().run(&["verify"]).code(1);
    let mut scene = scene;
    // As long as it is latched, the rows may be what the hand made of them.
    let rows = tillcast_tests::digest::of_database(&scene.site.dir().join(agent_db("store")));
    let drifted = [("price".to_owned(), rows["price"].clone())].into();
    let instance = scene.world.head.keys().find(|i| stream_of(i) == "price").unwrap().clone();
    scene.world.drifted = Some((instance, drifted));
    scene
}

fn enrol(id: &'static str) -> Scene {
    let (site, mut world) = begin(false);
    site.hq.run(&["init"]).ok();
    trusts(&site, &mut world);
    let code = |id: &str| site.hq.json(&["enroll", id])["code"].as_str().unwrap().to_owned();
    let mut codes = vec![code(STORE)];
    codes.push(code(REGISTER));
    let (name, product, path, code) = match id {
        STORE => ("enrol-relay", Product::Relay, relay_db("device"), &codes[0]),
        _ => ("enrol-register", Product::Agent, agent_db("device"), &codes[1]),
    };
    Scene { end: End::Enrolled(path), ..Scene::new(name, product, &["enroll", code], site, world) }
}

fn hq_enrols() -> Scene {
    let (site, mut world) = begin(true);
    publish_known(&site, &mut world, &["publish"]);
    let scene = Scene::new("hq-enrols", Product::Hq, &["enroll", "0421-07"], site, world);
    Scene { end: End::Known("0421-07".into()), ..scene }
}

/// A refused publish whose mail nobody takes.
fn hq_refuses() -> Scene {
    let (mut site, mut world) = begin(true);
    publish_known(&site, &mut world, &["publish"]);
    site.hq.set_text("mail.smtp", "smtp://127.0.0.1:9");
    site.hq.set_text("mail.from", "tillcast@example.com");
    site.hq.set("mail.to", "['it@example.com']");
    site.sql("UPDATE item SET name = hex(zeroblob(60)) WHERE sku = 'SKU0000003'");
    Scene { end: End::Mailed, code: 3, ..Scene::new("hq-refuses", Product::Hq, &["publish"], site, world) }
}

/// Headquarters takes heartbeats.
fn hq_serves() -> Scene {
    let (site, mut world) = begin_with(true, Builder::hq_service);
    publish_known(&site, &mut world, &["publish"]);
    Scene::new("hq-serves", Product::Hq, &["serve"], site, world)
}
