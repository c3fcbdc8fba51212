//! Answers: objects by Range and ETag, and small ones.

use super::Body;
use bytes::Bytes;
use hyper::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue, IF_NONE_MATCH, IF_RANGE,
    RANGE,
};
use hyper::{Response, StatusCode};

/// What a Range header asks of an object of known length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeAsked {
    /// All of it: no header, or one to be ignored (malformed, several ranges, other units).
    Whole,
    /// These bytes.
    Part {
        /// The first.
        start: u64,
        /// How many; at least one.
        length: u64,
    },
    /// 416.
    Unsatisfiable,
}

/// Reads `Range` and `If-Range` for an object of `length` bytes with the strong ETag `etag`
/// (quotes included).
pub fn range_asked(headers: &HeaderMap, length: u64, etag: &str) -> RangeAsked {
    let mut ranges = headers.get_all(RANGE).iter();
    let (Some(range), None) = (ranges.next(), ranges.next()) else { return RangeAsked::Whole };
    // A date, or a weak ETag, is never the same.
    if headers.get(IF_RANGE).is_some_and(|v| v.as_bytes() != etag.as_bytes()) {
        return RangeAsked::Whole;
    }
    range.to_str().ok().and_then(|r| parse_range(r, length)).unwrap_or(RangeAsked::Whole)
}

fn parse_range(text: &str, length: u64) -> Option<RangeAsked> {
    let (unit, range) = text.split_once('=')?;
    let (first, last) = range.trim().split_once('-')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") || !digits(first) || !digits(last) {
        return None;
    }
    if first.is_empty() {
        let n = number(last)?.min(length);
        return Some(if n == 0 {
            RangeAsked::Unsatisfiable
        } else {
            RangeAsked::Part { start: length - n, length: n }
        });
    }
    let start = number(first)?;
    let last = if last.is_empty() { u64::MAX } else { number(last)? };
    if last < start {
        return None;
    }
    if start >= length {
        return Some(RangeAsked::Unsatisfiable);
    }
    Some(RangeAsked::Part { start, length: last.min(length - 1) - start + 1 })
}

fn digits(s: &str) -> bool {
    s.bytes().all(|b| b.is_ascii_digit())
}

/// A number; one too large for us is past any object's end.
fn number(s: &str) -> Option<u64> {
    (!s.is_empty()).then(|| s.parse().unwrap_or(u64::MAX))
}

/// Whether `If-None-Match` names `etag` (quotes included) or is `*`: answer 304.
pub fn none_match(headers: &HeaderMap, etag: &str) -> bool {
    headers.get_all(IF_NONE_MATCH).iter().any(|value| {
        let Ok(value) = value.to_str() else { return false };
        value == etag || value.split(',').map(str::trim).any(|v| v == "*" || v.strip_prefix("W/").unwrap_or(v) == etag)
    })
}

/// An object to answer with. The header values are cheap to clone: make them once an object.
#[derive(Debug, Clone)]
pub struct Served {
    /// Its media type.
    pub content_type: HeaderValue,
    /// How long it may be kept.
    pub cache_control: HeaderValue,
    /// Strong, quotes included.
    pub etag: HeaderValue,
    /// Its length in bytes.
    pub length: u64,
}

/// Answers a GET or HEAD of an object: 200, 206, 304 or 416. `body` makes the body, of so many
/// bytes from the first number on.
pub fn answer_object(request: &HeaderMap, of: &Served, body: impl FnOnce(u64, u64) -> Body) -> Response<Body> {
    let etag = of.etag.to_str().unwrap_or_default();
    let mut response = Response::new(Body::Empty);
    if request.contains_key(IF_NONE_MATCH) && none_match(request, etag) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    } else {
        let (start, length) = match range_asked(request, of.length, etag) {
            RangeAsked::Whole => (0, of.length),
            RangeAsked::Part { start, length } => {
                *response.status_mut() = StatusCode::PARTIAL_CONTENT;
                let range = format!("bytes {start}-{}/{}", start + length - 1, of.length);
                set(&mut response, CONTENT_RANGE, range);
                (start, length)
            }
            RangeAsked::Unsatisfiable => {
                let mut response = text(StatusCode::RANGE_NOT_SATISFIABLE, "no such bytes");
                set(&mut response, CONTENT_RANGE, format!("bytes */{}", of.length));
                return response;
            }
        };
        *response.body_mut() = body(start, length);
        response.headers_mut().insert(CONTENT_TYPE, of.content_type.clone());
        response.headers_mut().insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    }
    response.headers_mut().insert(ETAG, of.etag.clone());
    response.headers_mut().insert(CACHE_CONTROL, of.cache_control.clone());
    response
}

fn set(response: &mut Response<Body>, name: hyper::header::HeaderName, value: String) {
    if let Ok(value) = HeaderValue::try_from(value) {
        response.headers_mut().insert(name, value);
    }
}

/// A line of text.
pub fn text(status: StatusCode, line: &str) -> Response<Body> {
    with_type(status, "text/plain; charset=utf-8", format!("{line}\n").into())
}

/// JSON, not to be kept by caches.
pub fn json(status: StatusCode, bytes: impl Into<Bytes>) -> Response<Body> {
    with_type(status, "application/json", bytes.into())
}

/// Nothing but a status.
pub fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = status;
    response
}

fn with_type(status: StatusCode, content_type: &'static str, bytes: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::Bytes(bytes));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn asked(range: &str, if_range: Option<&str>, length: u64) -> RangeAsked {
        let mut h = HeaderMap::new();
        h.insert(RANGE, range.parse().unwrap());
        if let Some(v) = if_range {
            h.insert(IF_RANGE, v.parse().unwrap());
        }
        range_asked(&h, length, "\"e\"")
    }

    #[test]
    fn ranges_are_read_as_rfc_9110_says() {
        use RangeAsked::{Part, Unsatisfiable, Whole};
        let part = |start, length| Part { start, length };
        for (range, length, expected) in [
            ("bytes=0-", 10, part(0, 10)),
            ("bytes=3-", 10, part(3, 7)),
            ("bytes=3-5", 10, part(3, 3)),
            ("bytes=3-99", 10, part(3, 7)),
            ("bytes=9-9", 10, part(9, 1)),
            ("Bytes= 1-2 ", 10, part(1, 2)),
            ("bytes=-4", 10, part(6, 4)),
            ("bytes=-99", 10, part(0, 10)),
            ("bytes=10-", 10, Unsatisfiable),
            ("bytes=0-", 0, Unsatisfiable),
            ("bytes=-0", 10, Unsatisfiable),
            ("bytes=-5", 0, Unsatisfiable),
            ("bytes=99999999999999999999-", 10, Unsatisfiable),
            ("bytes=3-99999999999999999999", 10, part(3, 7)),
            ("bytes=5-3", 10, Whole),
            ("bytes=0-1,3-4", 10, Whole),
            ("bytes=", 10, Whole),
            ("bytes=-", 10, Whole),
            ("bytes", 10, Whole),
            ("bytes=a-b", 10, Whole),
            ("bytes=+1-2", 10, Whole),
            ("rows=0-1", 10, Whole),
        ] {
            assert_eq!(asked(range, None, length), expected, "{range} of {length}");
        }
        assert_eq!(range_asked(&HeaderMap::new(), 10, "\"e\""), Whole);
        let mut two = HeaderMap::new();
        two.append(RANGE, "bytes=0-1".parse().unwrap());
        two.append(RANGE, "bytes=2-3".parse().unwrap());
        assert_eq!(range_asked(&two, 10, "\"e\""), Whole);
    }

    #[test]
    fn a_range_of_another_state_gets_the_whole() {
        assert_eq!(asked("bytes=3-", Some("\"e\""), 10), RangeAsked::Part { start: 3, length: 7 });
        for other in ["\"f\"", "W/\"e\"", "Sat, 21 Nov 2026 10:00:00 GMT", "e"] {
            assert_eq!(asked("bytes=3-", Some(other), 10), RangeAsked::Whole, "{other}");
        }
    }

    #[test]
    fn etags_match_weakly() {
        for (header, matches) in [
            ("\"e\"", true),
            ("W/\"e\"", true),
            ("\"a\", \"e\"", true),
            ("*", true),
            ("\"a\",W/\"b\"", false),
            ("e", false),
            ("", false),
        ] {
            let mut h = HeaderMap::new();
            h.insert(IF_NONE_MATCH, header.parse().unwrap());
            assert_eq!(none_match(&h, "\"e\""), matches, "{header}");
        }
        assert!(!none_match(&HeaderMap::new(), "\"e\""));
    }

    proptest! {
        #[test]
        fn no_range_leads_past_the_end(range in "(bytes=)?[-0-9, a]{0,24}", length in 0u64..50) {
            if let RangeAsked::Part { start, length: n } = asked(&range, None, length) {
                prop_assert!(n > 0 && start + n <= length);
            }
        }
    }
}
