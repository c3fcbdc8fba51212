//! Range, If-Range and If-None-Match, at headquarters' and at the relay's server. The input is a length, and headers a
//! line each; `ETAG` stands for the object's. Both must answer alike, and as RFC 9110 says, read a second time here.

use futures_util::FutureExt as _;
use http::header::{CONTENT_RANGE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_NONE_MATCH, IF_RANGE, RANGE};
use http::{Response, StatusCode};
use proto::http::{Body, RangeAsked, Served, answer_object, none_match, range_asked};
use proto::layout::ObjectName;
use store_relay::config::CacheRules;
use store_relay::lan::objects::Objects;

/// Status, Content-Range, bytes.
type Answer = (StatusCode, Option<String>, Vec<u8>);

fn answer(response: Response<Body>) -> Answer {
    let range = response.headers().get(CONTENT_RANGE).map(|v| v.to_str().unwrap().to_owned());
    let status = response.status();
    let bytes = match response.into_body() {
        Body::Bytes(b) => b.to_vec(),
        Body::Empty => Vec::new(),
        Body::File(_) => panic!("it is in memory"),
    };
    // A refusal may say so in words.
    (status, range, if status == StatusCode::RANGE_NOT_SATISFIABLE { Vec::new() } else { bytes })
}

pub fn range(data: &[u8]) {
    let (first, lines) = data.split_at(data.iter().position(|b| *b == b'\n').unwrap_or(data.len()));
    let Some(length) = std::str::from_utf8(first).ok().and_then(|n| n.parse::<u64>().ok()) else { return };
    let content: Vec<u8> = (0..length % 300).map(|n| n as u8).collect();
    let (tell, _rotten) = tokio::sync::mpsc::unbounded_channel();
    let objects = Objects::new(CacheRules::default(), tell);
    objects.put_small(ObjectName::Trust, content.clone().into());
    let object = objects.get("/trust.json").unwrap();
    let plain = objects.answer(&object, &HeaderMap::new(), false).now_or_never().unwrap();
    let etag = plain.headers()[ETAG].to_str().unwrap().to_owned();
    assert_eq!(answer(plain), (StatusCode::OK, None, content.clone()));

    let mut headers = HeaderMap::new();
    for line in lines.split(|b| *b == b'\n').take(8) {
        let Some(colon) = line.iter().position(|b| *b == b':') else { continue };
        let value = String::from_utf8_lossy(&line[colon + 1..]).trim().replace("ETAG", &etag);
        let name =
            [RANGE, IF_RANGE, IF_NONE_MATCH].into_iter().find(|n: &HeaderName| n.as_str().as_bytes() == &line[..colon]);
        if let (Some(name), Ok(value)) = (name, HeaderValue::from_str(&value)) {
            headers.append(name, value);
        }
    }
    // Of any length, not only of one that fits into memory.
    let asked = range_asked(&headers, length, &etag);
    assert_eq!(asked, by_hand(&headers, length, &etag), "{headers:?} of {length}");
    let ours = answer(objects.answer(&object, &headers, false).now_or_never().unwrap());
    let served = Served {
        content_type: HeaderValue::from_static("x/y"),
        cache_control: HeaderValue::from_static("no-store"),
        etag: etag.parse().unwrap(),
        length: content.len() as u64,
    };
    let part = |start: u64, n: u64| Body::Bytes(content[start as usize..][..n as usize].to_vec().into());
    let theirs = answer(answer_object(&headers, &served, part));
    assert_eq!(ours, theirs, "the relay against headquarters");
    is_right(&ours, &headers, &content, &etag);
    let head = objects.answer(&object, &headers, true).now_or_never().unwrap();
    assert!(answer(head).2.is_empty());
}

fn is_right((status, range, bytes): &Answer, headers: &HeaderMap, content: &[u8], etag: &str) {
    let length = content.len() as u64;
    if none_match(headers, etag) {
        return assert_eq!((status.as_u16(), range, bytes.len()), (304, &None, 0));
    }
    match by_hand(headers, length, etag) {
        RangeAsked::Whole => assert_eq!((status.as_u16(), range, &bytes[..]), (200, &None, content)),
        RangeAsked::Unsatisfiable => {
            assert_eq!((status.as_u16(), range.as_deref()), (416, Some(&format!("bytes */{length}")[..])));
        }
        RangeAsked::Part { start, length: n } => {
            let said = format!("bytes {start}-{}/{length}", start + n - 1);
            let wanted = &content[start as usize..(start + n) as usize];
            assert_eq!((status.as_u16(), range.as_deref(), &bytes[..]), (206, Some(&said[..]), wanted));
        }
    }
}

/// RFC 9110, 14.1.2 and 13.1.5, for one range of bytes.
fn by_hand(headers: &HeaderMap, length: u64, etag: &str) -> RangeAsked {
    let values: Vec<&HeaderValue> = headers.get_all(RANGE).iter().collect();
    let [value] = values[..] else { return RangeAsked::Whole };
    if headers.get(IF_RANGE).is_some_and(|v| v.as_bytes() != etag.as_bytes()) {
        return RangeAsked::Whole;
    }
    let Some(text) = value.to_str().ok().map(str::to_ascii_lowercase) else { return RangeAsked::Whole };
    let Some(spec) = text.trim_start().strip_prefix("bytes").and_then(|s| s.trim_start().strip_prefix('=')) else {
        return RangeAsked::Whole;
    };
    let number = |s: &str| -> Option<Option<u128>> {
        if s.is_empty() {
            return Some(None);
        }
        // Past all that can be counted, one number is as good as another.
        s.bytes().all(|b| b.is_ascii_digit()).then(|| Some(s.parse::<u64>().unwrap_or(u64::MAX).into()))
    };
    let ends: Vec<&str> = spec.trim().splitn(2, '-').collect();
    let [first, last] = ends[..] else { return RangeAsked::Whole };
    let whole = u128::from(length);
    let (first, last) = match (number(first), number(last)) {
        (Some(Some(first)), Some(None)) => (first, whole.saturating_sub(1)),
        (Some(Some(first)), Some(Some(last))) if first <= last => (first, last.min(whole.saturating_sub(1))),
        (Some(None), Some(Some(0))) => return RangeAsked::Unsatisfiable,
        (Some(None), Some(Some(n))) => (whole.saturating_sub(n), whole.saturating_sub(1)),
        _ => return RangeAsked::Whole,
    };
    if first >= whole {
        return RangeAsked::Unsatisfiable;
    }
    RangeAsked::Part { start: first as u64, length: (last - first + 1) as u64 }
}
