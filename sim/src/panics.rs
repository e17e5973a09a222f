//! Panics of simulated tasks. The runtime keeps a panic inside its task; here it is remembered, so
//! that no run passes in which an assertion of the production code failed.

use std::cell::RefCell;
use std::panic;
use std::sync::Once;

thread_local! {
    static FIRST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Remembers the first panic of this thread from now on.
pub(crate) fn watch() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let place = info.location().map_or_else(String::new, ToString::to_string);
            let payload = info.payload();
            let text = payload.downcast_ref::<&str>().copied();
            let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
            let text = text.unwrap_or("(no text)");
            // A panic while the cell is borrowed can't happen: nothing below panics.
            FIRST.with(|first| {
                first.borrow_mut().get_or_insert_with(|| format!("{place}: {text}"));
            });
            previous(info);
        }));
    });
    FIRST.take();
}

/// The first panic of this thread since [`watch`].
pub(crate) fn first() -> Option<String> {
    FIRST.with(|first| first.borrow().clone())
}
