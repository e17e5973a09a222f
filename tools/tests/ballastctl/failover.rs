//! Which nodes are asked, and when the next one is.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::{Duration, Instant};

use ballast_api::{Client, EndpointError, v1};
use tonic::Code;

use crate::ballastctl;
use crate::fixture::Node;

/// An address where nobody listens: bound once, so that it was free, then closed.
fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[test]
fn the_next_node_is_asked_when_one_is_away_or_has_no_quorum() {
    let (node, lonely) = (Node::start(), Node::without_quorum());
    for first in [nobody(), lonely.url()] {
        let run = ballastctl(&format!("{first},{}", node.url()), "volume create db --size 1GiB");
        assert_eq!(run.code, 0, "{}", run.err);
    }
}

#[test]
fn when_none_answers_each_is_named() {
    let (nobody, lonely) = (nobody(), Node::without_quorum());
    let run = ballastctl(&format!("{nobody},{}", lonely.url()), "volume list");
    assert_eq!((run.code, run.out.as_str()), (1, ""));
    for part in [&nobody, "refused", &lonely.url(), "no leader", "try again"] {
        assert!(run.err.contains(part), "{part} is not in {}", run.err);
    }
}

fn on_runtime<F: Future>(work: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

#[test]
fn a_node_that_hangs_is_left_after_the_time_limit() {
    // Accepts into its backlog and never answers, as a stopped process does.
    let hangs = TcpListener::bind("127.0.0.1:0").unwrap();
    let hanging = format!("http://{}", hangs.local_addr().unwrap());
    let node = Node::start();
    on_runtime(async {
        let client = Client::new([&hanging]).unwrap().with_call_timeout(Duration::from_millis(100));
        let status = client.get_status(v1::GetStatusRequest {}).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert!(status.message().contains("no answer in time"), "{}", status.message());

        let client = Client::new([hanging, node.url()]).unwrap();
        let client = client.with_call_timeout(Duration::from_secs(3));
        client.get_status(v1::GetStatusRequest {}).await.unwrap();
    });
}

#[test]
fn a_node_that_hangs_is_left_long_before_a_long_time_limit() {
    let hangs = TcpListener::bind("127.0.0.1:0").unwrap();
    let hanging = format!("http://{}", hangs.local_addr().unwrap());
    let node = Node::start();
    on_runtime(async {
        let client = Client::new([hanging, node.url()]).unwrap();
        let client = client.with_call_timeout(Duration::from_secs(3600));
        let answer = tokio::time::timeout(Duration::from_secs(60), async {
            client.get_status(v1::GetStatusRequest {}).await
        });
        answer.await.expect("it is left").unwrap();
    });
}

#[test]
fn the_time_limit_is_that_of_the_command_however_many_nodes_hang() {
    let hang: Vec<TcpListener> =
        (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let urls: Vec<String> =
        hang.iter().map(|it| format!("http://{}", it.local_addr().unwrap())).collect();
    let start = Instant::now();
    let run = ballastctl(&urls.join(","), "status --timeout 2");
    // One limit for each would be 6 s.
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!((run.code, run.out.as_str()), (1, ""));
    for part in ["no answer in time", "not asked any more", "time is up"] {
        assert!(run.err.contains(part), "{part} is not in {}", run.err);
    }
    assert!(urls.iter().all(|url| run.err.contains(url)), "{}", run.err);
}

/// A server that says this to whoever connects, and hangs up when it has read something.
fn stranger(says: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            // Whoever has gone already needs no answer.
            let _ = stream.write_all(says).and_then(|()| stream.read(&mut [0; 4]).map(drop));
        }
    });
    url
}

#[test]
fn a_port_that_is_not_the_administrations_is_told_so() {
    let (nbd, web) = (stranger(b"NBDMAGICIHAVEOPT\0\x03"), stranger(b"HTTP/1.1 405 No\r\n\r\n"));
    for (url, says) in [(&nbd, "an NBD server answers there"), (&web, "a web server answers there")]
    {
        let start = Instant::now();
        let run = ballastctl(url, "status");
        assert_eq!((run.code, run.out.as_str()), (1, ""));
        let told = run.err.contains(&format!("{url}: {says}")) && run.err.contains("listen.grpc");
        assert!(told, "{}", run.err);
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    }
    let node = Node::start();
    let run = ballastctl(&format!("{nbd},{}", node.url()), "status");
    assert_eq!(run.code, 0, "the next one is asked: {}", run.err);
}

#[test]
fn a_refusal_is_an_answer() {
    let (first, second) = (Node::start(), Node::start());
    on_runtime(async {
        let client = Client::new([first.url(), second.url()]).unwrap();
        let request = v1::GetVolumeRequest { volume: "nothing".to_owned(), fresh: false };
        let status = client.get_volume(request).await.unwrap_err();
        assert_eq!(status.code(), Code::NotFound);
    });
}

#[test]
fn a_node_that_stops_between_two_requests() {
    let (first, second) = (Node::start(), Node::start());
    on_runtime(async {
        let client = Client::new([first.url(), second.url()]).unwrap();
        client.health(v1::HealthRequest {}).await.unwrap();
        drop(first);
        client.health(v1::HealthRequest {}).await.unwrap();
    });
}

#[test]
fn endpoints() {
    on_runtime(async {
        for good in ["http://a:1", "a:1", "http://[::1]:7400/", " 10.0.0.1:7400 "] {
            assert!(Client::new([good]).is_ok(), "{good}");
        }
        for bad in ["", "a", "http://a", "http://a:0", "http://a:1/x", "ftp://a:1", "a b:1"] {
            let error = Client::new([bad]).err();
            assert_eq!(error, Some(EndpointError::Invalid(bad.to_owned())), "{bad}");
        }
        let tls = EndpointError::Tls("https://a:1".to_owned());
        assert_eq!(Client::new(["https://a:1"]).err(), Some(tls));
        assert_eq!(Client::new::<&str>([]).err(), Some(EndpointError::None));
    });
}
