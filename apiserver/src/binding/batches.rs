//! How bindings are spread over transactions: pure.

use std::collections::{BTreeMap, BTreeSet};

/// What a transaction takes.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Keys that it may compare, or write.
    pub keys: usize,
    /// Bytes of what it writes.
    pub bytes: usize,
}

/// What a binding needs of it, beside the key of its node, which those of one node share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load<'a> {
    /// Where the pod is to go.
    pub node: &'a str,
    /// Bytes of the pod, and of what the node's ledger may have of it.
    pub bytes: usize,
}

/// Batches in the order of the items.
pub fn in_order<T>(items: Vec<T>, of: impl Fn(&T) -> Load<'_>, room: Room) -> Vec<Vec<T>> {
    let (mut batches, mut nodes, mut bytes) = (Vec::<Vec<T>>::new(), BTreeSet::new(), 0_usize);
    for item in items {
        let Load { node, bytes: own } = of(&item);
        let keys = batches.last().map(|batch| batch.len() + nodes.len() + 1 + usize::from(!nodes.contains(node)));
        if keys.is_none_or(|keys| keys > room.keys) || bytes.saturating_add(own) > room.bytes {
            nodes.clear();
            bytes = 0;
            batches.push(Vec::new());
        }
        nodes.insert(node.to_owned());
        bytes = bytes.saturating_add(own);
        if let Some(batch) = batches.last_mut() {
            batch.push(item);
        }
    }
    batches
}

/// Batches of whole nodes, as far as a transaction takes them; the pods of a node that alone are too many are spread over several.
pub fn by_node<T>(items: Vec<T>, of: impl Fn(&T) -> Load<'_>, room: Room) -> Vec<Vec<T>> {
    let mut nodes: BTreeMap<String, Vec<T>> = BTreeMap::new();
    for item in items {
        match nodes.get_mut(of(&item).node) {
            Some(group) => group.push(item),
            None => drop(nodes.insert(of(&item).node.to_owned(), vec![item])),
        }
    }
    let mut batches: Vec<Vec<T>> = Vec::new();
    // What the last batch has.
    let (mut keys, mut bytes) = (room.keys, 0_usize);
    for mut group in nodes.into_values() {
        while !group.is_empty() {
            let (count, size) = fitting(group.iter().map(|item| of(item).bytes), room);
            let rest = group.split_off(count);
            match batches.last_mut() {
                Some(last)
                    if keys.saturating_add(count + 1) <= room.keys && bytes.saturating_add(size) <= room.bytes =>
                {
                    (keys, bytes) = (keys + count + 1, bytes + size);
                    last.append(&mut group);
                }
                _ => {
                    (keys, bytes) = (count + 1, size);
                    batches.push(std::mem::take(&mut group));
                }
            }
            group = rest;
        }
    }
    batches
}

/// How many of one node's items go into a transaction of their own, at least one, and their bytes.
fn fitting(sizes: impl Iterator<Item = usize>, room: Room) -> (usize, usize) {
    let (mut count, mut bytes) = (0, 0_usize);
    for size in sizes.take(room.keys.saturating_sub(1).max(1)) {
        if count > 0 && bytes.saturating_add(size) > room.bytes {
            break;
        }
        (count, bytes) = (count + 1, bytes.saturating_add(size));
    }
    (count, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Item = (char, &'static str, usize);

    fn of(item: &Item) -> Load<'_> {
        Load { node: item.1, bytes: item.2 }
    }

    /// `a:n1:10` is an item of ten bytes for node n1; `|` ends a batch.
    fn check(way: &str, room: Room, given: &'static str, want: &str) {
        let items = given.split_whitespace().map(|word| {
            let mut parts = word.split(':');
            let name = parts.next().and_then(|name| name.chars().next()).expect("a name");
            let (node, bytes) = (parts.next().expect("a node"), parts.next().expect("a size"));
            (name, node, bytes.parse().expect("a number"))
        });
        let items: Vec<Item> = items.collect();
        let batches = if way == "in order" { in_order(items, of, room) } else { by_node(items, of, room) };
        for batch in &batches {
            let nodes: BTreeSet<&str> = batch.iter().map(|item| item.1).collect();
            let bytes: usize = batch.iter().map(|item| item.2).sum();
            let fits = batch.len() + nodes.len() <= room.keys && bytes <= room.bytes;
            assert!(batch.len() == 1 || fits, "{batches:?}");
        }
        let shown: Vec<String> =
            batches.iter().map(|batch| batch.iter().map(|item| item.0.to_string()).collect::<String>()).collect();
        assert_eq!(shown.join(" "), want, "{way}, {room:?}: {given}");
    }

    #[test]
    fn the_table_of_batches() {
        let keys = |keys| Room { keys, bytes: 1_000 };
        let mixed = "a:n2:1 b:n1:1 c:n2:1 d:n1:1 e:n3:1";
        check("in order", keys(100), mixed, "abcde");
        check("by node", keys(100), mixed, "bdace");
        check("in order", keys(4), mixed, "ab cd e");
        check("by node", keys(4), mixed, "bd ac e");
        check("by node", keys(6), mixed, "bdac e");
        check("by node", keys(3), "a:n:1 b:n:1 c:n:1", "ab c");
        // What is too large for any transaction goes alone, and the store says so.
        check("in order", keys(100), "a:n:600 b:n:600 c:m:400 d:m:1001 e:m:1", "a bc d e");
        check("by node", keys(100), "a:n:600 b:n:600 c:m:400 d:m:1001 e:m:1", "c d ea b");
        check("in order", keys(1), "a:n:1 b:n:1", "a b");
        check("by node", keys(1), "a:n:1 b:n:1", "a b");
        check("by node", keys(100), "", "");
    }
}
