//! The chain: two stores of two registers each behind a WAN of their own, with real master data where it lies beside
//! the repository, else the sample.

use std::collections::BTreeMap;
use std::path::PathBuf;
use tillcast_tests::site::Node;
use tillcast_tests::{Net, Nginx, Proxy, Site, Smtp, digest, real_data};

/// Stores with their zones.
const STORES: [(&str, &str); 2] = [("0421", "east"), ("0815", "west")];

/// A store's lines to the outside.
struct Wan {
    objects: Proxy,
    service: Proxy,
}

/// The installation and all around it.
pub struct Chain {
    pub site: Site,
    pub smtp: Smtp,
    wan: BTreeMap<String, Wan>,
    /// Where the real data lies.
    pub data: Option<PathBuf>,
    /// Table and query of everything that is published.
    queries: Vec<(String, String)>,
    _cdn: Nginx,
}

impl Chain {
    /// Builds and enrols; `day` in seconds sets every pause and retention. `sample`: without the real data.
    pub fn build(day: f64, sample: bool) -> Chain {
        let smtp = Smtp::start();
        let seconds = |days: f64| format!("\"{}ms\"", (days * day * 1000.0).max(1000.0) as u64);
        let mut site = Site::builder()
            .stores(&STORES)
            .registers(2)
            .items(300)
            .hq_service()
            .mail(&smtp)
            .hq("publish.deltas", "5")
            .hq("publish.keep", &seconds(2.0))
            .hq("publish.delete_after", &seconds(0.5))
            .hq("publish.mail_wait", "\"1s\"")
            .hq("alerts.store_silent", &seconds(0.2))
            .hq("alerts.register_silent", &seconds(0.4))
            .hq("serve.alert_tick", "\"1s\"")
            .hq("serve.resign_tick", &seconds(0.5))
            .relay("poll", "\"500ms\"")
            .relay("grace", &seconds(0.5))
            .relay("error_grace", &seconds(1.0))
            .relay("events", "200")
            .agent("relay_silent", &seconds(0.1))
            .build();
        let cdn = Nginx::serve(&site.bucket());
        let data = real_data::folder().filter(|_| !sample);
        if data.is_some() {
            real_data::add_items_and_promotions(&mut site);
        }
        let mut wan = BTreeMap::new();
        for (store, _) in STORES {
            let lines = Wan { objects: Proxy::to(&cdn.url()), service: Proxy::to(&site.hq.url()) };
            let relay = site.relays.get_mut(store).unwrap();
            relay.set("sources", &format!("[\"{}\"]", lines.objects.url()));
            relay.set_text("hq", &lines.service.url());
            for (id, register) in &mut site.registers {
                if id.starts_with(store) {
                    register.set("fallback", &format!("[\"{}\"]", lines.objects.url()));
                }
            }
            wan.insert(store.to_owned(), lines);
        }
        let queries = queries(site.hq.streams());
        Chain { site, smtp, wan, data, queries, _cdn: cdn }
    }

    /// The stores' ids.
    pub fn stores() -> impl Iterator<Item = &'static str> {
        STORES.iter().map(|(id, _)| *id)
    }

    /// Every daemon's node.
    pub fn nodes(&self) -> Vec<&Node> {
        std::iter::once(&self.site.hq).chain(self.site.relays.values()).chain(self.site.registers.values()).collect()
    }

    /// Breaks or mends a store's lines.
    pub fn set_wan(&self, store: &str, net: &Net) {
        let lines = &self.wan[store];
        lines.objects.set(net.clone());
        lines.service.set(net.clone());
    }

    /// What a store's tables should be now, from the source alone.
    pub fn expected(&self, store: &str) -> BTreeMap<String, String> {
        let db = self.site.model();
        let zone = STORES.iter().find(|(id, _)| *id == store).unwrap().1;
        let bound = |sql: &str| sql.replace(":zone", &format!("'{zone}'")).replace(":store", &format!("'{store}'"));
        self.queries.iter().map(|(table, sql)| (table.clone(), digest::of_query(&db, &bound(sql)))).collect()
    }
}

/// Table and query of every stream in hq.toml.
fn queries(streams: &str) -> Vec<(String, String)> {
    let parsed: toml::Table = streams.parse().unwrap();
    let text = |v: &toml::Value, key: &str| v[key].as_str().unwrap().to_owned();
    let streams = parsed["stream"].as_array().unwrap().iter();
    let tables = streams.flat_map(|s| s["table"].as_array().unwrap());
    tables.map(|t| (text(t, "name"), text(t, "query"))).collect()
}
