//! The few verbs of S3 that the store needs, over HTTP on loopback, from memory: put, ranged get, head, delete, list in pages,
//! multipart, conditions; with faults. Written from Amazon's API reference, so that the client's requests and not its own
//! idea of a server are what is tested. Not here: checking signatures (it looks whether there is one), more than one bucket.

use std::{
    collections::BTreeMap,
    fmt::Write,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::{Arc, Mutex, MutexGuard},
    thread,
};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::Request,
    http::{HeaderMap, Method, StatusCode, header},
    response::Response,
};
use tokio::runtime::Builder;

pub const BUCKET: &str = "bucket";
/// Entries of a page of a list; S3 has 1000.
const PAGE: usize = 3;
/// Least size of a part but the last.
const PART_BYTES_MIN: usize = 5 << 20;

/// A server, running until the process ends.
#[derive(Clone)]
pub struct Server {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
pub struct State {
    pub objects: BTreeMap<String, (Vec<u8>, u64)>,
    pub uploads: BTreeMap<String, (String, BTreeMap<usize, Vec<u8>>)>,
    /// Method, path and query of every request.
    pub requests: Vec<String>,
    /// So many requests are answered with 503 SlowDown.
    pub busy: usize,
    /// So many conditional puts are carried out and answered with 500.
    pub lost_answers: usize,
    counter: u64,
}

impl Server {
    pub fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            state: Arc::default(),
        };
        let state = Arc::clone(&server.state);
        thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let router = Router::new().fallback(async move |request: Request| {
                    let (parts, body) = request.into_parts();
                    let body = to_bytes(body, usize::MAX).await.unwrap();
                    let query = parts.uri.query().unwrap_or_default();
                    let call = Call {
                        path: decode(parts.uri.path()),
                        query: pairs(query),
                        headers: parts.headers,
                        method: parts.method,
                        body: body.to_vec(),
                    };
                    let mut state = state.lock().unwrap();
                    state
                        .requests
                        .push(format!("{} {}?{query}", call.method, call.path));
                    state.answer(call)
                });
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                axum::serve(listener, router).await.unwrap();
            });
        });
        server
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

struct Call {
    method: Method,
    path: String,
    query: BTreeMap<String, String>,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Call {
    fn header(&self, name: header::HeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    fn asks(&self, name: &str) -> Option<&str> {
        self.query.get(name).map(String::as_str)
    }
}

impl State {
    fn answer(&mut self, call: Call) -> Response {
        if self.busy > 0 {
            self.busy -= 1;
            return error(StatusCode::SERVICE_UNAVAILABLE, "SlowDown");
        }
        let signed = call.header(header::AUTHORIZATION);
        if !signed.is_some_and(|it| it.starts_with("AWS4-HMAC-SHA256 Credential=")) {
            return error(StatusCode::FORBIDDEN, "AccessDenied");
        }
        let key = call.path.trim_start_matches('/').strip_prefix(BUCKET);
        let Some(key) = key.map(|key| key.trim_start_matches('/').to_owned()) else {
            return error(StatusCode::NOT_FOUND, "NoSuchBucket");
        };
        let upload = call.asks("uploadId").map(str::to_owned);
        match (call.method.as_str(), upload) {
            ("GET", _) if key.is_empty() => self.list(&call),
            ("POST", _) if call.asks("delete").is_some() => self.delete_many(&call),
            ("POST", None) if call.asks("uploads").is_some() => {
                let id = format!("upload-{}", self.next());
                self.uploads.insert(id.clone(), (key, BTreeMap::new()));
                let name = "InitiateMultipartUploadResult";
                xml(&format!("<{name}><UploadId>{id}</UploadId></{name}>"))
            }
            ("PUT", Some(id)) => self.part(&call, &id),
            ("POST", Some(id)) => self.complete(&call, &id),
            ("DELETE", Some(id)) => {
                self.uploads.remove(&id);
                empty(StatusCode::NO_CONTENT)
            }
            ("PUT", None) => self.put(call, key),
            ("GET" | "HEAD", None) => self.get(&call, &key),
            ("DELETE", None) => {
                self.objects.remove(&key);
                empty(StatusCode::NO_CONTENT)
            }
            _ => error(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed"),
        }
    }

    fn next(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    fn put(&mut self, call: Call, key: String) -> Response {
        let present = self.objects.get(&key).map(|(_, tag)| tag_of(*tag));
        let wanted = call.header(header::IF_MATCH);
        if call.header(header::IF_NONE_MATCH) == Some("*") && present.is_some() {
            return error(StatusCode::PRECONDITION_FAILED, "PreconditionFailed");
        }
        match (wanted, &present) {
            (Some(_), None) => return error(StatusCode::NOT_FOUND, "NoSuchKey"),
            (Some(wanted), Some(present)) if wanted != present => {
                return error(StatusCode::PRECONDITION_FAILED, "PreconditionFailed");
            }
            _ => {}
        }
        let conditional = wanted.is_some() || call.headers.contains_key(header::IF_NONE_MATCH);
        let tag = self.next();
        self.objects.insert(key, (call.body, tag));
        if conditional && self.lost_answers > 0 {
            self.lost_answers -= 1;
            return error(StatusCode::INTERNAL_SERVER_ERROR, "InternalError");
        }
        tagged(StatusCode::OK, tag).body(Body::empty()).unwrap()
    }

    fn get(&self, call: &Call, key: &str) -> Response {
        let Some((bytes, tag)) = self.objects.get(key) else {
            return error(StatusCode::NOT_FOUND, "NoSuchKey");
        };
        if call
            .header(header::IF_MATCH)
            .is_some_and(|wanted| wanted != tag_of(*tag))
        {
            return error(StatusCode::PRECONDITION_FAILED, "PreconditionFailed");
        }
        let range = call.header(header::RANGE).map(|range| {
            let (start, end) = range
                .strip_prefix("bytes=")
                .unwrap()
                .split_once('-')
                .unwrap();
            let end = end.parse::<usize>().unwrap() + 1;
            start.parse::<usize>().unwrap()..end.min(bytes.len())
        });
        let answer = |status| {
            tagged(status, *tag).header(header::LAST_MODIFIED, "Tue, 01 Jan 2030 00:00:00 GMT")
        };
        if call.method == Method::HEAD {
            let answer = answer(StatusCode::OK).header(header::CONTENT_LENGTH, bytes.len());
            return answer.body(Body::empty()).unwrap();
        }
        match range {
            Some(range) if range.start >= range.end => {
                error(StatusCode::RANGE_NOT_SATISFIABLE, "InvalidRange")
            }
            Some(range) => {
                let shown = format!("bytes {}-{}/{}", range.start, range.end - 1, bytes.len());
                let answer =
                    answer(StatusCode::PARTIAL_CONTENT).header(header::CONTENT_RANGE, shown);
                answer.body(Body::from(bytes[range].to_vec())).unwrap()
            }
            None => answer(StatusCode::OK)
                .body(Body::from(bytes.clone()))
                .unwrap(),
        }
    }

    fn part(&mut self, call: &Call, id: &str) -> Response {
        let number = call.asks("partNumber").unwrap().parse().unwrap();
        let tag = self.next();
        let Some((_, parts)) = self.uploads.get_mut(id) else {
            return error(StatusCode::NOT_FOUND, "NoSuchUpload");
        };
        parts.insert(number, call.body.clone());
        tagged(StatusCode::OK, tag).body(Body::empty()).unwrap()
    }

    fn complete(&mut self, call: &Call, id: &str) -> Response {
        let Some((key, parts)) = self.uploads.remove(id) else {
            return error(StatusCode::NOT_FOUND, "NoSuchUpload");
        };
        let named = String::from_utf8(call.body.clone())
            .unwrap()
            .matches("<PartNumber>")
            .count();
        assert_eq!(named, parts.len(), "the client names all parts");
        assert!(
            parts.keys().copied().eq(1..=parts.len()),
            "parts count from 1"
        );
        let last = parts.len();
        if parts
            .iter()
            .any(|(number, part)| *number < last && part.len() < PART_BYTES_MIN)
        {
            return error(StatusCode::BAD_REQUEST, "EntityTooSmall");
        }
        let bytes: Vec<u8> = parts.into_values().flatten().collect();
        let tag = self.next();
        self.objects.insert(key.clone(), (bytes, tag));
        let name = "CompleteMultipartUploadResult";
        xml(&format!(
            "<{name}><Bucket>{BUCKET}</Bucket><Key>{key}</Key><ETag>{}</ETag></{name}>",
            tag_of(tag).replace('"', "&quot;")
        ))
    }

    fn delete_many(&mut self, call: &Call) -> Response {
        let body = String::from_utf8(call.body.clone()).unwrap();
        let mut deleted = String::new();
        for key in body.split("<Key>").skip(1) {
            let key = key.split("</Key>").next().unwrap();
            self.objects.remove(key);
            write!(deleted, "<Deleted><Key>{key}</Key></Deleted>").unwrap();
        }
        xml(&format!("<DeleteResult>{deleted}</DeleteResult>"))
    }

    fn list(&self, call: &Call) -> Response {
        let prefix = call.asks("prefix").unwrap_or_default();
        let after = call.asks("continuation-token").unwrap_or_default();
        let delimiter = call.asks("delimiter").filter(|it| !it.is_empty());
        // Each key, or the folder that stands for it, once.
        let mut entries: BTreeMap<String, Option<usize>> = BTreeMap::new();
        for (key, (bytes, _)) in self
            .objects
            .iter()
            .filter(|(key, _)| key.starts_with(prefix))
        {
            let below = delimiter.and_then(|it| key[prefix.len()..].find(it));
            match below {
                Some(at) => entries.insert(key[..=prefix.len() + at].to_owned(), None),
                None => entries.insert(key.clone(), Some(bytes.len())),
            };
        }
        let mut rest = entries
            .into_iter()
            .filter(|(name, _)| name.as_str() > after)
            .peekable();
        let (mut text, mut last) = (String::new(), String::new());
        for (name, bytes) in rest.by_ref().take(PAGE) {
            match bytes {
                None => write!(text, "<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>"),
                Some(bytes) => write!(
                    text,
                    "<Contents><Key>{name}</Key><LastModified>2030-01-01T00:00:00.000Z</LastModified>\
                     <ETag>&quot;x&quot;</ETag><Size>{bytes}</Size></Contents>"
                ),
            }
            .unwrap();
            last = name;
        }
        if rest.peek().is_some() {
            write!(
                text,
                "<IsTruncated>true</IsTruncated><NextContinuationToken>{last}</NextContinuationToken>"
            )
            .unwrap();
        }
        xml(&format!("<ListBucketResult>{text}</ListBucketResult>"))
    }
}

fn tag_of(number: u64) -> String {
    format!("\"tag-{number}\"")
}

fn tagged(status: StatusCode, number: u64) -> axum::http::response::Builder {
    Response::builder()
        .status(status)
        .header(header::ETAG, tag_of(number))
}

fn xml(content: &str) -> Response {
    let text = format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>{content}");
    Response::new(Body::from(text))
}

fn empty(status: StatusCode) -> Response {
    Response::builder()
        .status(status)
        .body(Body::empty())
        .unwrap()
}

fn error(status: StatusCode, code: &str) -> Response {
    let text = format!("<Error><Code>{code}</Code><Message>{code}</Message></Error>");
    Response::builder()
        .status(status)
        .body(Body::from(text))
        .unwrap()
}

fn pairs(query: &str) -> BTreeMap<String, String> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs
        .map(|(name, value)| (decode(name), decode(value)))
        .collect()
}

/// Undoes percent-encoding.
fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, later @ ..] = rest {
        rest = later;
        if *first == b'%' {
            let digits = std::str::from_utf8(&later[..2]).unwrap();
            bytes.push(u8::from_str_radix(digits, 16).unwrap());
            rest = &later[2..];
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8(bytes).unwrap()
}
