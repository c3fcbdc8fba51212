//! The page at `/`: streams, what is wrong, stores and their devices. Plain HTML, no script; every
//! text from outside is escaped by the template.

use super::{App, unavailable};
use crate::carry::Receipts;
use crate::fleet::{DeviceView, long};
use crate::ledger::{Episode, Head, LedgerError, StoreRow};
use crate::mail::one_line;
use crate::status::behind;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::response::{IntoResponse, Response};
use maud::{DOCTYPE, Markup, html};
use proto::clock::{Timestamp, since};
use proto::ids::{DeviceId, Instance, StoreId};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Stores on one page.
const STORES: usize = 500;

#[derive(Debug, Default, Deserialize)]
pub struct Filter {
    q: Option<String>,
}

struct View<'a> {
    app: &'a App,
    now: Timestamp,
    heads: BTreeMap<Instance, Head>,
    stores: Vec<StoreRow>,
    devices: BTreeMap<StoreId, Vec<DeviceView<'a>>>,
    receipts: Receipts,
    episodes: Vec<Episode>,
    mails: usize,
    filter: String,
}

pub async fn fleet(State(app): State<Arc<App>>, filter: Result<Query<Filter>, QueryRejection>) -> Response {
    let _turn = app.turn.lock().await;
    match shown(&app, filter.ok().and_then(|f| f.0.q).unwrap_or_default()).await {
        Ok(page) => {
            let policy =
                "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";
            let headers = [
                (CONTENT_TYPE, "text/html; charset=utf-8"),
                (CONTENT_SECURITY_POLICY, policy),
                (CACHE_CONTROL, "no-store"),
                (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            ];
            (headers, page).into_response()
        }
        Err(e) => unavailable(&e),
    }
}

async fn shown(app: &App, filter: String) -> Result<String, LedgerError> {
    let enrolled = app.ledger.enrolled().await?;
    Ok(page(&view(app, &enrolled, filter).await?).into_string())
}

pub async fn style() -> Response {
    ([(CONTENT_TYPE, "text/css"), (CACHE_CONTROL, "public, max-age=3600")], include_str!("style.css")).into_response()
}

async fn view<'a>(app: &'a App, enrolled: &'a [DeviceId], filter: String) -> Result<View<'a>, LedgerError> {
    let mut devices: BTreeMap<StoreId, Vec<DeviceView<'_>>> = BTreeMap::new();
    for d in app.intake.views(enrolled) {
        devices.entry(d.id.store().clone()).or_default().push(d);
    }
    Ok(View {
        app,
        now: app.clock.now(),
        heads: app.ledger.heads().await?,
        stores: app.ledger.stores().await?,
        devices,
        receipts: Receipts::read(&app.ledger, &app.config.limits).await?,
        episodes: app.ledger.open_episodes("").await?,
        mails: app.ledger.unsent_mails().await?.len(),
        filter,
    })
}

fn page(v: &View<'_>) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta http-equiv="refresh" content="10";
                title { "Tillcast headquarters" }
                link rel="stylesheet" href="/style.css";
            }
            body {
                h1 { "Tillcast headquarters" }
                p.meta { (v.now) " UTC · " (v.stores.len()) " stores · " (v.mails) " mails waiting" }
                (episodes(v))
                (streams(v))
                (stores(v))
            }
        }
    }
}

fn episodes(v: &View<'_>) -> Markup {
    html! {
        h2 { "What is wrong" }
        @if v.episodes.is_empty() {
            p.ok { "Nothing." }
        } @else {
            ul.bad {
                @for e in v.episodes.iter().take(STORES) {
                    li { (e.text) " " span.meta { "for " (long(since(v.now, e.opened_at))) } }
                }
            }
        }
    }
}

fn streams(v: &View<'_>) -> Markup {
    html! {
        h2 { "Streams" }
        table {
            thead { tr { th { "Stream" } th { "Audience" } th { "Version" } th { "Signed" } th { "Packs listed" } } }
            tbody {
                @for (i, h) in v.heads.iter().take(STORES) {
                    tr {
                        td { (i.stream) }
                        td { (i.audience) }
                        td.n { (h.version) }
                        td { (long(since(v.now, h.signed_at))) " ago" }
                        td.n { (h.packs.len()) }
                    }
                }
                @if v.heads.is_empty() { tr { td colspan="5" { "Nothing was published yet." } } }
            }
        }
    }
}

fn stores(v: &View<'_>) -> Markup {
    let fits = |s: &&StoreRow| v.filter.is_empty() || s.seen.id.as_str().contains(&v.filter);
    let some: Vec<&StoreRow> = v.stores.iter().filter(fits).collect();
    html! {
        h2 { "Stores" }
        @if v.stores.len() > 20 {
            form method="get" action="/" {
                input type="search" name="q" value=(v.filter) placeholder="store id";
                button { "Find" }
            }
        }
        table {
            thead { tr { th { "Store" } th { "Zone" } th { "Manifest" } th { "Device" } th { "Heard" } th { "Versions" } th { "State" } } }
            tbody { @for s in some.iter().take(STORES) { (store(v, s)) } }
        }
        @if some.len() > STORES { p.meta { "… and " (some.len() - STORES) " more: find by id" } }
    }
}

fn store(v: &View<'_>, s: &StoreRow) -> Markup {
    let none = Vec::new();
    let devices = v.devices.get(&s.seen.id).unwrap_or(&none);
    let rows = devices.len().max(1);
    let first = html! {
        td rowspan=(rows) { (s.seen.id) @if let Some(r) = &s.seen.region { " " span.meta { (r) } } }
        td rowspan=(rows) { @if let Some(z) = &s.seen.zone { (z) } }
        td.n rowspan=(rows) {
            @if s.serial > 0 { (s.serial) @if s.put_serial < s.serial { " " span.bad { "not put" } } }
            @if s.vanished_at.is_some() { " " span.bad { "no longer in the list" } }
        }
    };
    html! {
        @if devices.is_empty() {
            tr { (first) td colspan="4" { span.meta { "no device is enrolled" } } }
        }
        @for (n, d) in devices.iter().enumerate() {
            tr { @if n == 0 { (first) } (device(v, s, d)) }
        }
    }
}

fn device(v: &View<'_>, s: &StoreRow, d: &DeviceView<'_>) -> Markup {
    let (role, limit) = match d.id {
        DeviceId::Relay(_) => ("relay", v.app.config.alerts.store_silent.0),
        DeviceId::Register(_) => ("register", v.app.config.alerts.register_silent.0),
    };
    let held = v.receipts.held(d);
    let behind = held.as_ref().map_or_else(Vec::new, |held| behind(&v.app.config.streams, &v.heads, &s.seen, held));
    let errors = d.beat.as_ref().map_or(&[][..], |beat| &beat.errors);
    html! {
        td { (d.id) " " span.meta { (role) } }
        td class=[d.silent_for.is_some_and(|silent| silent >= limit).then_some("bad")] {
            @match d.silent_for { None => span.meta { "never" }, Some(silent) => { (long(silent)) " ago" } }
            @if let Some(receipt) = v.receipts.newest_word(d) { " " span.meta { "by stick " (receipt.time) } }
        }
        td {
            @for (i, version) in held.iter().flatten() {
                span.stream { (i) " " @match version { Some(n) => b { (n) }, None => b { "–" } } }
            }
        }
        td {
            @if held.is_some() {
                @for e in errors.iter().take(5) { div.bad { (one_line(&e.code, 40)) ": " (one_line(&e.text, 300)) } }
                @for i in &behind { div.warn { "behind in " (i.stream) } }
                @if errors.is_empty() && behind.is_empty() { span.ok { "ok" } }
            }
        }
    }
}
