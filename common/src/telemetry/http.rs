//! The HTTP endpoint: /healthz (the process answers), /readyz (its checks
//! pass) and the metrics as text. Nothing else, no writes, no tenants.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use http::header::CONTENT_TYPE;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use thiserror::Error;
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

use super::{Health, Metrics};
use crate::cli::HttpArgs;

/// How long a peer may take to send its request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the endpoint is not there.
#[derive(Debug, Error)]
#[error("--http-endpoint {address}: {source}")]
pub struct EndpointError {
    address: SocketAddr,
    source: std::io::Error,
}

/// The listening endpoint; it ends when dropped.
pub struct Endpoint {
    /// Where it listens, with the port the system chose when 0 was asked for.
    pub address: SocketAddr,
    _task: AbortOnDropHandle<()>,
}

struct Answers {
    health: Health,
    metrics: Metrics,
    metrics_path: String,
}

/// Listens as the flags say; `None` when they do not ask for it.
pub async fn serve(
    args: &HttpArgs,
    health: Health,
    metrics: Metrics,
) -> Result<Option<Endpoint>, EndpointError> {
    let Some(address) = args.http_endpoint else {
        return Ok(None);
    };
    let fail = |source| EndpointError { address, source };
    let listener = TcpListener::bind(address).await.map_err(fail)?;
    let address = listener.local_addr().map_err(fail)?;
    let answers = Arc::new(Answers {
        health,
        metrics,
        metrics_path: args.metrics_path.clone(),
    });
    let task = AbortOnDropHandle::new(tokio::spawn(accept(listener, answers)));
    Ok(Some(Endpoint {
        address,
        _task: task,
    }))
}

async fn accept(listener: TcpListener, answers: Arc<Answers>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, mostly: give them time to come back.
                tracing::warn!(%error, "HTTP endpoint");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let answers = answers.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let response = answer(&answers, &request);
                async move { Ok::<_, Infallible>(response) }
            });
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "HTTP endpoint");
            }
        });
    }
}

fn answer(answers: &Answers, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return text(StatusCode::METHOD_NOT_ALLOWED, "GET only\n".to_owned());
    }
    match request.uri().path() {
        "/healthz" => text(StatusCode::OK, "ok\n".to_owned()),
        "/readyz" => match answers.health.ready() {
            Ok(()) => text(StatusCode::OK, "ok\n".to_owned()),
            Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, why),
        },
        path if path == answers.metrics_path => exposition(&answers.metrics),
        _ => text(StatusCode::NOT_FOUND, "not found\n".to_owned()),
    }
}

fn exposition(metrics: &Metrics) -> Response<Full<Bytes>> {
    let registry = metrics.lock().unwrap_or_else(PoisonError::into_inner);
    let mut body = String::new();
    match prometheus_client::encoding::text::encode(&mut body, &registry) {
        Ok(()) => {
            let mut response = text(StatusCode::OK, body);
            response.headers_mut().insert(
                CONTENT_TYPE,
                http::HeaderValue::from_static(
                    "application/openmetrics-text; version=1.0.0; charset=utf-8",
                ),
            );
            response
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(
        CONTENT_TYPE,
        http::HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::metrics::counter::Counter;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn probes_tell_the_truth_and_metrics_are_text() {
        let (health, metrics) = (Health::default(), super::super::metrics());
        let counter = Counter::<u64>::default();
        metrics
            .lock()
            .unwrap()
            .register("claims", "Claims seen", counter.clone());
        counter.inc();
        let check = health.check("cache", "not filled yet");
        let args = HttpArgs {
            http_endpoint: Some("127.0.0.1:0".parse().unwrap()),
            metrics_path: "/m".to_owned(),
        };
        let endpoint = serve(&args, health, metrics).await.unwrap().unwrap();
        let to = endpoint.address;
        assert!(get(to, "/healthz").await.starts_with("HTTP/1.1 200"));
        let cold = get(to, "/readyz").await;
        assert!(cold.starts_with("HTTP/1.1 503") && cold.contains("cache: not filled yet"));
        check.pass();
        assert!(get(to, "/readyz").await.starts_with("HTTP/1.1 200"));
        assert!(
            get(to, "/m")
                .await
                .contains("vf_provisioner_claims_total 1")
        );
        assert!(get(to, "/metrics").await.starts_with("HTTP/1.1 404"));
    }
}
