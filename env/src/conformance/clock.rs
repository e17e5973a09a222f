//! Checks of the clock and of randomness.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use super::together;
use crate::Env;

/// Every check of the clock and of randomness.
pub async fn all<E: Env>(env: &E) {
    monotonic(env).await;
    sleep_order(env).await;
    random(env);
}

/// The clock never goes back, and a sleep takes at least its duration of it.
pub async fn monotonic<E: Env>(env: &E) {
    let mut last = env.now();
    for millis in [0, 1, 5, 20] {
        let asked = Duration::from_millis(millis);
        env.sleep(asked).await;
        let now = env.now();
        assert!(now >= last, "the monotonic clock went back");
        assert!(now.since(last) >= asked, "a sleep of {asked:?} took {:?}", now.since(last));
        last = now;
    }
    assert!(env.wall_ms() > 0, "the wall clock shows a time after 1970");
}

/// Sleeps end in the order of their ends, not of their starts.
pub async fn sleep_order<E: Env>(env: &E) {
    let woken = Rc::new(RefCell::new(Vec::new()));
    let sleeps = [60_u64, 20, 40, 0].map(|millis| {
        let (env, woken) = (env.clone(), woken.clone());
        async move {
            env.sleep(Duration::from_millis(millis)).await;
            woken.borrow_mut().push(millis);
        }
    });
    together(env, sleeps.into()).await;
    assert_eq!(*woken.borrow(), [0, 20, 40, 60], "sleeps ended out of order");
}

/// Numbers differ.
pub fn random<E: Env>(env: &E) {
    let numbers: std::collections::BTreeSet<u64> = (0..100).map(|_| env.random_u64()).collect();
    assert_eq!(numbers.len(), 100, "100 random numbers of 64 bits repeat");
    assert_ne!(env.random_16(), env.random_16(), "two ids are equal");
}
