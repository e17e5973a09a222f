//! Metrics and health over HTTP/1.1: three pages, one request per connection.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::admin::Access;
use crate::prometheus::Metrics;

use ballast_block::limits::{HTTP_CONNECTIONS_MAX, HTTP_HEAD_BYTES_MAX};

/// Longest that a client may take for its request, and for taking the answer.
const CLIENT_MAX: Duration = Duration::from_secs(10);
/// Longest that the shard may take to answer before the process counts as hung.
const HEALTHY_MAX: Duration = Duration::from_secs(5);
/// Pause after a failed accept: most likely there are no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const TEXT: &str = "text/plain; charset=utf-8";
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

struct Page {
    status: &'static str,
    kind: &'static str,
    body: String,
}

/// Serves until the process ends.
pub async fn serve(listener: TcpListener, access: Access, metrics: Metrics) {
    let room = std::sync::Arc::new(Semaphore::new(HTTP_CONNECTIONS_MAX));
    loop {
        let permit = room.clone().acquire_owned().await.expect("never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                let (access, metrics) = (access.clone(), metrics.clone());
                tokio::spawn(async move {
                    // A client that is slow or talks nonsense is of no interest.
                    let _ = tokio::time::timeout(
                        CLIENT_MAX + HEALTHY_MAX,
                        answer(stream, &access, &metrics),
                    )
                    .await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection for metrics");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, access: &Access, metrics: &Metrics) -> std::io::Result<()> {
    let Some((method, path)) = request(&mut stream).await? else { return Ok(()) };
    let page = match (method.as_str(), path.as_str()) {
        ("GET" | "HEAD", path) => page(path, access, metrics).await,
        _ => text("405 Method Not Allowed", "use GET\n"),
    };
    let length = page.body.len();
    let (status, kind) = (page.status, page.kind);
    let mut reply = format!(
        "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\
         connection: close\r\n\r\n"
    );
    if method != "HEAD" {
        reply.push_str(&page.body);
    }
    stream.write_all(reply.as_bytes()).await?;
    stream.shutdown().await
}

/// Method and path; `None` when the head is too long or not HTTP.
async fn request(stream: &mut TcpStream) -> std::io::Result<Option<(String, String)>> {
    let mut head = Vec::with_capacity(1024);
    let ends = |head: &[u8]| head.windows(4).any(|window| window == b"\r\n\r\n");
    while !ends(&head) {
        if head.len() >= HTTP_HEAD_BYTES_MAX || stream.read_buf(&mut head).await? == 0 {
            return Ok(None);
        }
    }
    let text = String::from_utf8_lossy(&head);
    let mut words = text.lines().next().unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some(_)) = (words.next(), words.next(), words.next()) else {
        return Ok(None);
    };
    let path = target.split('?').next().unwrap_or_default();
    Ok(Some((method.to_owned(), path.to_owned())))
}

async fn page(path: &str, access: &Access, metrics: &Metrics) -> Page {
    match path {
        "/metrics" => {
            Page { status: "200 OK", kind: PROMETHEUS, body: metrics.render(access).await }
        }
        "/healthz" => match healthy(access).await {
            Ok(()) => text("200 OK", "ok\n"),
            Err(problem) => text("503 Service Unavailable", problem),
        },
        "/readyz" => match access.ready().await {
            Ok(()) => text("200 OK", "ready\n"),
            Err(reason) => text("503 Service Unavailable", format!("{reason}\n")),
        },
        "/" => text("200 OK", "ballastd: /metrics /healthz /readyz\n"),
        _ => text("404 Not Found", "there are /metrics, /healthz and /readyz\n"),
    }
}

/// Alive: every shard that serves answers. One that has ended is no reason to end the others.
async fn healthy(access: &Access) -> Result<(), String> {
    let serving = access.shards.iter().filter(|shard| shard.is_serving());
    let answers = serving.map(async |shard| {
        let answer = tokio::time::timeout(HEALTHY_MAX, shard.ask(async |_| ())).await;
        answer.is_err().then(|| shard.id())
    });
    let silent = futures_util::future::join_all(answers).await;
    match silent.into_iter().flatten().next() {
        Some(shard) => Err(format!("{shard} does not answer\n")),
        None => Ok(()),
    }
}

fn text(status: &'static str, body: impl Into<String>) -> Page {
    Page { status, kind: TEXT, body: body.into() }
}
