//! What tests of a replica's life have in common: what is written, and what a crash must have left.

use ballast_env::Env;
use ballast_raft_store::entry::{Body, Command, Origin};
use ballast_raft_store::types::{Entry, EntryPayload, log_id};
use openraft::storage::{RaftLogReader, RaftLogStorage};

use super::model::{LogModel, Model, VOLUME, stamp_of};
use super::{Machine, blocks, read};
use crate::support::crash::Random;

/// An entry with a write, a trim, or something else.
pub fn some_entry(term: u64, index: u64, random: &mut Random) -> Entry {
    let start = random.below(VOLUME - 64);
    let mut entry = Entry { log_id: log_id(term, index), payload: EntryPayload::Blank };
    let stamp = stamp_of(&entry);
    let mut origin = Origin::default();
    entry.payload = match random.below(20) {
        0 => EntryPayload::Blank,
        1 => EntryPayload::Normal(Command::control(vec![index as u8; 30].into())),
        2 => EntryPayload::Normal(Command::control(vec![index as u8; 5000].into())),
        3 => {
            let count = random.below(64);
            EntryPayload::Normal(Command { origin, body: Body::Trim { start, count } })
        }
        4 => {
            origin.key = 77;
            EntryPayload::Normal(Command::write(origin, start, blocks(2, stamp)))
        }
        5 => EntryPayload::Normal(Command::write(origin, start, blocks(64, stamp))),
        _ => {
            let count = 1 + random.below(4) as u32;
            EntryPayload::Normal(Command::write(origin, start, blocks(count, stamp)))
        }
    };
    entry
}

/// Compares a recovered replica with its model, and applies what its log has.
pub async fn recovered<E: Env>(machine: &Machine<E>, model: &mut Model) {
    let mut log = machine.replica.log();
    let state = log.get_log_state().await.unwrap();
    let mut found = LogModel { purged: state.last_purged_log_id, ..LogModel::default() };
    let mut next = state.last_purged_log_id.map_or(0, |id| id.index + 1);
    while next <= state.last_log_id.map_or(0, |id| id.index) && state.last_log_id.is_some() {
        let entries = log.limited_get_log_entries(next, u64::MAX).await.unwrap();
        if entries.is_empty() {
            assert_eq!(state.last_log_id, state.last_purged_log_id);
            break;
        }
        next += entries.len() as u64;
        found.entries.extend(entries.into_iter().map(|entry| (entry.log_id.index, entry)));
    }
    let vote = log.read_vote().await.unwrap();
    let id = machine.replica.id();
    model.recover(&found, vote).unwrap_or_else(|problem| panic!("{id}: {problem}"));
    let applied = machine.replica.applied();
    assert!(applied <= found.last(), "{id}: the checkpoint is ahead of the log");
    let count = applied.map_or(0, |id| id.index as usize + 1);
    assert!(count <= model.applied.len(), "{id}: more is applied than was");
    assert_eq!(*machine.state.borrow(), model.state(count), "{id}: state at {applied:?}");
    // What had been applied and did not last was not durable on this replica: it comes again.
    let last = found.last().map_or(0, |last| last.index as usize + 1);
    model.applied.truncate(last);
    for entry in found.entries.range(count as u64..).map(|(_, entry)| entry) {
        let at = entry.log_id.index as usize;
        // A truncation and what came after it may be lost together, though the others committed it.
        if model.applied.get(at).is_some_and(|before| before != entry) {
            model.applied.truncate(at);
        }
        if model.applied.len() == at {
            model.applied.push(entry.clone());
        }
    }
    for entry in log.try_get_log_entries(count as u64..).await.unwrap() {
        machine.apply_one(entry);
    }
    assert_eq!(*machine.state.borrow(), model.state(model.applied.len()));
    let content = read(&machine.replica, 0, VOLUME as u32).await;
    let content = content.unwrap_or_else(|problem| panic!("{id}: {problem:?}"));
    assert!(content == model.content(model.applied.len()), "{id}: content differs");
}
