//! HTTP as clients speak it.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.to_vec()).unwrap()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().unwrap()
    }

    /// The JSON of each event; the last one must be `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        let text = self.text();
        let events = text.strip_suffix("data: [DONE]\n\n").expect("the stream is complete");
        parse(events)
    }
}

pub fn parse(events: &str) -> Vec<Value> {
    let datas = events.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap());
    datas.map(|data| serde_json::from_str(data).unwrap()).collect()
}

pub async fn post(address: SocketAddr, path: &str, body: Value) -> Answer {
    send(address, Method::POST, path, &[], body.to_string()).await
}

pub async fn get(address: SocketAddr, path: &str) -> Answer {
    send(address, Method::GET, path, &[], "").await
}

pub async fn send(
    address: SocketAddr,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> Answer {
    let mut open = Open::send(address, method, path, headers, body).await;
    let body = open.response.body_mut().collect().await.unwrap().to_bytes();
    Answer { status: open.response.status(), headers: open.response.headers().clone(), body }
}

/// A connection with an answer on it; dropped, the client has left.
pub struct Open {
    pub response: http::Response<Incoming>,
    driver: JoinHandle<()>,
}

impl Open {
    pub async fn send(
        address: SocketAddr,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        let driver = tokio::spawn(async move {
            let _ = connection.await;
        });
        let mut request = Request::builder().method(method).uri(path).header("host", "frontend");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body.into())).unwrap();
        let response = sender.send_request(request).await.unwrap();
        Self { response, driver }
    }

    pub async fn post(address: SocketAddr, path: &str, body: Value) -> Self {
        Self::send(address, Method::POST, path, &[], body.to_string()).await
    }

    /// Text that has come; at least something.
    pub async fn next(&mut self) -> Option<String> {
        let frame = self.response.body_mut().frame().await?.ok()?;
        Some(String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.driver.abort();
    }
}
