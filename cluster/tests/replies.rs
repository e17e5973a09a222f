//! Replies on their way from the node that leads the cluster group.

mod common;

use ballast_block::ReplicaId;
use ballast_cluster::{Refusal, RefusalCode, Reply};
use common::{cluster_of, create, pool_id};

#[test]
fn replies_survive_the_way() {
    let mut state = cluster_of(3);
    let pool = pool_id(7);
    let rolled_back =
        Reply::PoolRolledBack { pool, known: 5, reported: 4, lost: vec![ReplicaId(1000)] };
    let volume = state.apply(create("a", 1, 3));
    assert!(matches!(volume, Reply::Volume(_)));
    for reply in [Reply::Done, volume, rolled_back, Reply::GivenUp] {
        assert_eq!(Reply::decode(&reply.encode()), Ok(reply));
    }
}

#[test]
fn a_refusal_keeps_code_and_words() {
    let original = Refusal::UnknownPool { pool: pool_id(7) };
    let refused = Reply::Refused(original.clone());
    let Ok(Reply::Refused(forwarded)) = Reply::decode(&refused.encode()) else { panic!() };
    assert_eq!(forwarded.code(), RefusalCode::NotFound);
    assert_eq!(forwarded.to_string(), original.to_string());
}
