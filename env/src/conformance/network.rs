//! Checks of connections.

use std::io::{ErrorKind, IoSlice};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::Env;
use crate::network::{Address, Listener};

/// Every check of connections. `address` is one to listen on; with TCP, port 0.
pub async fn all<E: Env>(env: &E, address: &Address) {
    order(env, address).await;
    both_directions(env, address).await;
    closed(env, address).await;
    half_closed(env, address).await;
    handed_on(env, address).await;
    handed_on_when_closed(env, address).await;
    refused(env, address).await;
    ports(env, address).await;
}

async fn pair<E: Env>(env: &E, address: &Address) -> (E::Stream, E::Stream) {
    let listener = env.listen(address).await.expect("listen");
    let place = listener.address();
    let (connected, accepted) = tokio::join!(env.connect(&place), listener.accept());
    let (stream, peer) = accepted.expect("accept");
    assert!(!peer.is_empty(), "the other side has a name");
    (connected.expect("connect"), stream)
}

/// Bytes arrive all, once and in order, whatever the sizes of the writes; also vectored ones.
pub async fn order<E: Env>(env: &E, address: &Address) {
    let (mut sender, mut receiver) = pair(env, address).await;
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|index| (index % 251) as u8).collect();
    let expected = bytes.clone();
    let _detached = env.spawn(async move {
        let (plain, vectored) = bytes.split_at(1_000_000);
        for piece in plain.chunks(77_777) {
            sender.write_all(piece).await.expect("write");
        }
        let mut rest = vectored;
        while !rest.is_empty() {
            let (first, second) = rest.split_at(rest.len().min(1000));
            let second = &second[..second.len().min(100_000)];
            let parts = [IoSlice::new(first), IoSlice::new(&[]), IoSlice::new(second)];
            let written = sender.write_vectored(&parts).await.expect("vectored write");
            assert!(written > 0 && written <= first.len() + second.len());
            rest = &rest[written..];
        }
        sender.shutdown().await.expect("shutdown");
    });
    let mut received = Vec::new();
    receiver.read_to_end(&mut received).await.expect("read");
    assert!(received == expected, "the bytes arrived changed");
}

/// Both ends talk at once; a request gets its answer while more is under way.
pub async fn both_directions<E: Env>(env: &E, address: &Address) {
    let (mut client, mut server) = pair(env, address).await;
    let _detached = env.spawn(async move {
        let mut word = [0; 8];
        while server.read_exact(&mut word).await.is_ok() {
            server.write_all(&word).await.expect("answer");
        }
    });
    for number in 0..200_u64 {
        client.write_all(&number.to_le_bytes()).await.expect("ask");
        let mut word = [0; 8];
        client.read_exact(&mut word).await.expect("answer");
        assert_eq!(u64::from_le_bytes(word), number);
    }
}

/// A dropped stream is the end for the other side, after the bytes sent before.
pub async fn closed<E: Env>(env: &E, address: &Address) {
    let (mut sender, mut receiver) = pair(env, address).await;
    sender.write_all(b"last words").await.expect("write");
    drop(sender);
    let mut received = Vec::new();
    receiver.read_to_end(&mut received).await.expect("read");
    assert_eq!(received, b"last words");
    let error = loop {
        // The first may still be taken: the other side's refusal is not known yet.
        if let Err(error) = receiver.write_all(&[0; 100_000]).await {
            break error;
        }
    };
    let kinds = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset, ErrorKind::ConnectionAborted];
    assert!(kinds.contains(&error.kind()), "writing to a closed stream: {error}");
}

/// After `shutdown` the other direction works on.
pub async fn half_closed<E: Env>(env: &E, address: &Address) {
    let (mut asker, mut answerer) = pair(env, address).await;
    asker.write_all(b"ask").await.expect("write");
    asker.shutdown().await.expect("shutdown");
    let mut question = Vec::new();
    answerer.read_to_end(&mut question).await.expect("read");
    assert_eq!(question, b"ask");
    answerer.write_all(b"answer").await.expect("write");
    drop(answerer);
    let mut answer = Vec::new();
    asker.read_to_end(&mut answer).await.expect("read");
    assert_eq!(answer, b"answer");
}

/// A connection that is detached and adopted again and again, while bytes are under way in both
/// directions, loses none and adds none.
pub async fn handed_on<E: Env>(env: &E, address: &Address) {
    let (client, mut server) = pair(env, address).await;
    let bytes: Vec<u8> = (0..2_000_000_u32).map(|index| (index % 251) as u8).collect();
    let (mut reader, mut writer) = tokio::io::split(client);
    let sent = bytes.clone();
    let _sending = env.spawn(async move {
        for piece in sent.chunks(77_777) {
            writer.write_all(piece).await.expect("write");
        }
        writer.shutdown().await.expect("shutdown");
    });
    let (sender, answers) = tokio::sync::oneshot::channel();
    let _receiving = env.spawn(async move {
        let mut received = Vec::new();
        reader.read_to_end(&mut received).await.expect("read");
        drop(sender.send(received));
    });
    let mut received = Vec::new();
    for answer in bytes.chunks(50_000) {
        let detached = env.detach(server).expect("detach");
        server = env.adopt(detached).expect("adopt");
        server.write_all(answer).await.expect("write");
        let mut piece = [0; 30_000];
        let count = server.read(&mut piece).await.expect("read");
        received.extend(&piece[..count]);
    }
    server.read_to_end(&mut received).await.expect("read");
    drop(server);
    assert!(received == bytes, "the bytes arrived changed");
    assert!(answers.await.expect("all was read") == bytes, "the answers arrived changed");
}

/// An end sent to a connection before it was detached is still there after; the other direction
/// works on. A detached connection that is dropped is the end for the other side.
pub async fn handed_on_when_closed<E: Env>(env: &E, address: &Address) {
    let (mut asker, mut answerer) = pair(env, address).await;
    asker.write_all(b"ask").await.expect("write");
    asker.shutdown().await.expect("shutdown");
    let mut question = [0; 3];
    answerer.read_exact(&mut question).await.expect("read");
    let detached = env.detach(answerer).expect("detach");
    let mut answerer = env.adopt(detached).expect("adopt");
    assert_eq!(answerer.read(&mut question).await.expect("read"), 0);
    answerer.write_all(b"answer").await.expect("write");
    drop(env.detach(answerer).expect("detach"));
    let mut answer = Vec::new();
    asker.read_to_end(&mut answer).await.expect("read");
    assert_eq!(answer, b"answer");
}

/// Where nobody listens any more, a connect is refused.
pub async fn refused<E: Env>(env: &E, address: &Address) {
    let listener = env.listen(address).await.expect("listen");
    let place = listener.address();
    drop(listener);
    let error = env.connect(&place).await.err().expect("nobody listens");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}

/// Two listeners on port 0 get ports of their own; one that is taken is refused; one that was
/// given back can be had again.
pub async fn ports<E: Env>(env: &E, address: &Address) {
    let Address::Tcp(_) = address else { return };
    let first = env.listen(address).await.expect("listen");
    let second = env.listen(address).await.expect("listen again");
    let (Address::Tcp(one), Address::Tcp(two)) = (first.address(), second.address()) else {
        panic!("a TCP listener has a TCP address");
    };
    assert!(one.port() != 0 && two.port() != 0 && one != two);
    let taken = env.listen(&first.address()).await.err().expect("taken");
    assert_eq!(taken.kind(), ErrorKind::AddrInUse);
    let place = first.address();
    drop(first);
    let again = env.listen(&place).await.expect("free again");
    assert_eq!(again.address(), place);
}
