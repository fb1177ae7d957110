//! Error objects: `{"error": {"message", "type", "param", "code"}}`.

use std::borrow::Cow;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

/// What went wrong, in the words of `requests_total{error_type}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request cannot be served by anyone.
    Validation,
    /// No such model or route.
    NotFound,
    /// Every worker is full.
    Overload,
    /// No worker can be reached.
    Unavailable,
    /// The answer took longer than it may.
    ResponseTimeout,
    /// Anything else.
    Internal,
}

impl ErrorKind {
    /// The label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Validation => "validation",
            Self::NotFound => "not_found",
            Self::Overload => "overload",
            Self::Unavailable => "unavailable",
            Self::ResponseTimeout => "response_timeout",
            Self::Internal => "internal",
        }
    }
}

/// An answer that is an error.
#[derive(Debug, Clone)]
pub struct ApiError {
    pub status: StatusCode,
    pub kind: ErrorKind,
    message: String,
    param: Option<Cow<'static, str>>,
    code: Option<&'static str>,
    retry_after_seconds: Option<u32>,
    close: bool,
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: Content<'a>,
}

#[derive(Serialize)]
struct Content<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl ApiError {
    fn new(
        status: StatusCode,
        kind: ErrorKind,
        code: Option<&'static str>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            status,
            kind,
            message: message.into(),
            param: None,
            code,
            retry_after_seconds: None,
            close: false,
        }
    }

    /// 400: this parameter is wrong.
    pub fn parameter(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::request(message) }
    }

    /// 400: the request as a whole is wrong.
    pub fn request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, ErrorKind::Validation, None, message)
    }

    /// 400: prompt and answer do not fit.
    pub fn too_long(param: &'static str, context_length: u32, prompt_tokens: usize, exact: bool) -> Self {
        let at_least = if exact { "" } else { "at least " };
        let message = format!(
            "This model's maximum context length is {context_length} tokens. However, your prompt has {at_least}{prompt_tokens} tokens. Please shorten it.",
        );
        let code = Some("context_length_exceeded");
        let error = Self::new(StatusCode::BAD_REQUEST, ErrorKind::Validation, code, message);
        Self { param: Some(param.into()), ..error }
    }

    /// 404: no worker ever served this model.
    pub fn model_not_found(model: &str) -> Self {
        let message = format!("The model `{}` does not exist.", shortened(model));
        let error = Self::new(StatusCode::NOT_FOUND, ErrorKind::NotFound, Some("model_not_found"), message);
        Self { param: Some("model".into()), ..error }
    }

    /// 404: no such route.
    pub fn route_not_found(path: &str) -> Self {
        let message = format!("There is nothing at {}.", shortened(path));
        Self::new(StatusCode::NOT_FOUND, ErrorKind::NotFound, Some("not_found"), message)
    }

    /// 405.
    pub fn wrong_method(method: &http::Method, path: &str) -> Self {
        let message = format!("{method} is not possible at {}.", shortened(path));
        Self::new(StatusCode::METHOD_NOT_ALLOWED, ErrorKind::Validation, Some("method_not_allowed"), message)
    }

    /// 413; the connection ends with it, since the rest of the body may still be coming.
    pub fn body_too_large(limit_bytes: usize) -> Self {
        let message = format!("The request body exceeds the limit of {} MB.", limit_bytes / 1_000_000);
        let code = Some("request_too_large");
        let error = Self::new(StatusCode::PAYLOAD_TOO_LARGE, ErrorKind::Validation, code, message);
        Self { close: true, ..error }
    }

    /// 408: the body did not come.
    pub fn body_timeout(seconds: u64) -> Self {
        let message = format!("The request body was not received within {seconds} s.");
        let code = Some("request_timeout");
        let error = Self::new(StatusCode::REQUEST_TIMEOUT, ErrorKind::Validation, code, message);
        Self { close: true, ..error }
    }

    /// 503: no worker of the model can be used.
    pub fn no_worker(model: &str, reason: &str) -> Self {
        let message = format!("No worker for the model `{}` is available: {reason}.", shortened(model));
        let code = Some("no_worker");
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, ErrorKind::Unavailable, code, message);
        Self { retry_after_seconds: Some(1), ..error }
    }

    /// 503: the queues of all workers are full.
    pub fn overloaded(model: &str) -> Self {
        let message = format!("All workers for the model `{}` are busy.", shortened(model));
        let code = Some("overloaded");
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, ErrorKind::Overload, code, message);
        Self { retry_after_seconds: Some(1), ..error }
    }

    /// 502: the worker was lost, or gave up, after the first token.
    pub fn worker_lost(reason: &str) -> Self {
        let message = format!("The worker failed while it was answering: {reason}.");
        Self::new(StatusCode::BAD_GATEWAY, ErrorKind::Unavailable, Some("worker_lost"), message)
    }

    /// 504: the answer was not complete in time.
    pub fn response_timeout(time: std::time::Duration) -> Self {
        let message = format!("The answer was not complete within {time:?}, which is the limit here.");
        let code = Some("response_timeout");
        Self::new(StatusCode::GATEWAY_TIMEOUT, ErrorKind::ResponseTimeout, code, message)
    }

    /// What a worker refuses begins with the name of the field, which so becomes the parameter. `guided` is the one that
    /// said what the answer must look like.
    pub fn of_worker(self, guided: &'static str) -> Self {
        if self.kind != ErrorKind::Validation || self.param.is_some() {
            return self;
        }
        let Some((field, detail)) = self.message.split_once(": ") else { return self };
        if field.is_empty() || !field.bytes().all(|byte| byte.is_ascii_lowercase() || b"_.".contains(&byte)) {
            return self;
        }
        let name = if field == "guide" { guided.to_owned() } else { field.to_owned() };
        let message = format!("'{name}': {detail}");
        Self { param: Some(name.into()), message, ..self }
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, ErrorKind::Internal, Some("internal_error"), message)
    }

    /// What is wrong, in words.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The error object as JSON.
    pub fn json(&self) -> Vec<u8> {
        let r#type = match self.kind {
            ErrorKind::Validation | ErrorKind::NotFound => "invalid_request_error",
            ErrorKind::Overload | ErrorKind::Unavailable => "service_unavailable_error",
            ErrorKind::ResponseTimeout | ErrorKind::Internal => "server_error",
        };
        let error = Content { message: &self.message, r#type, param: self.param.as_deref(), code: self.code };
        serde_json::to_vec(&Envelope { error }).unwrap_or_default()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.json()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after_seconds {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.close {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// Foreign text in a message, cut to a length that fits one.
fn shortened(text: &str) -> &str {
    let end = text.char_indices().map(|(at, _)| at).take_while(|&at| at <= 200).last().unwrap_or(0);
    if text.len() <= 200 { text } else { &text[..end] }
}
