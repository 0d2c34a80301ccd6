//! A client whose caches are behind: it does not hear of what was there when it began.

use http::{Method, Request, Response, header};
use http_body_util::BodyExt as _;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};

/// A client through which every list of `plural` is empty. One object can be read, and a watch
/// shows what comes after the list.
#[must_use]
pub fn blind(client: Client, plural: &str) -> Client {
    let namespace = client.default_namespace().to_owned();
    let end = format!("/{plural}");
    let service = tower::service_fn(move |request: Request<Body>| {
        let (client, end) = (client.clone(), end.clone());
        async move {
            let watch = request.uri().query().is_some_and(|q| q.contains("watch="));
            let list =
                request.method() == Method::GET && request.uri().path().ends_with(&end) && !watch;
            let answer = client.send(request).await?;
            if list {
                emptied(answer).await
            } else {
                Ok(answer)
            }
        }
    });
    Client::new(service, namespace)
}

async fn emptied(answer: Response<Body>) -> Result<Response<Body>, kube::Error> {
    let (mut head, body) = answer.into_parts();
    let bytes = body.collect().await?.to_bytes();
    let mut list: Value = serde_json::from_slice(&bytes).map_err(kube::Error::SerdeError)?;
    if let Some(items) = list.get_mut("items") {
        *items = json!([]);
    }
    head.headers.remove(header::CONTENT_LENGTH);
    Ok(Response::from_parts(
        head,
        list.to_string().into_bytes().into(),
    ))
}
