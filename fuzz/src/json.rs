//! Changes JSON as JSON: bytes that are changed blindly hardly ever are an object that gets past
//! the API server, and it is what gets past it that the planners have to bear.

use fastrand::Rng;
use serde_json::{Value, json};

/// Changes bytes in place: buffer, length, most; answers the new length.
type Bytewise = fn(&mut [u8], usize, usize) -> usize;

/// Words that mean something somewhere.
const WORDS: [&str; 40] = [
    "",
    "True",
    "False",
    "Unknown",
    "Ready",
    "Synced",
    "Admitted",
    "Resolved",
    "Attached",
    "metadata",
    "status",
    "spec",
    "name",
    "uid",
    "namespace",
    "generation",
    "conditions",
    "deletionTimestamp",
    "creationTimestamp",
    "2026-01-01T00:00:01Z",
    "finalizers",
    "sriov.harvesterhci.io/host-provisioner",
    "sriov.harvesterhci.io/guest-generation",
    "sriov.harvesterhci.io/is-default-class",
    "sriov.harvesterhci.io/mirrored-by",
    "device",
    "attachment",
    "hostNode",
    "admitted",
    "network",
    "macAddress",
    "vlan",
    "id",
    "qos",
    "trust",
    "Running",
    "Vlan",
    "return",
    "error",
    "event",
];

/// Changes the JSON in `data[..size]`; `None` if it is none, or now and then so that it stops
/// being one.
pub fn mutate(
    data: &mut [u8],
    size: usize,
    max_size: usize,
    seed: u32,
    bytewise: Bytewise,
) -> Option<usize> {
    let mut random = Rng::with_seed(seed.into());
    if random.u8(..) < 12 {
        return None;
    }
    let mut document: Value = serde_json::from_slice(data.get(..size)?).ok()?;
    for _ in 0..random.usize(1..5) {
        change(&mut document, &mut random, bytewise);
    }
    let text = serde_json::to_vec(&document).ok()?;
    if text.len() > max_size {
        return None;
    }
    data.get_mut(..text.len())?.copy_from_slice(&text);
    Some(text.len())
}

fn change(document: &mut Value, random: &mut Rng, bytewise: Bytewise) {
    let all = count(document);
    let other = nth(document, random.usize(..all)).cloned();
    let other = other.unwrap_or(Value::Null);
    let Some(node) = nth_mut(document, &mut random.usize(..all)) else {
        return;
    };
    match (random.u8(..16), node) {
        (0, node) => *node = other,
        (1, node) => *node = scalar(random),
        (2..=4, Value::Array(list)) if !list.is_empty() => {
            let at = random.usize(..list.len());
            let element = list.get(at).cloned().unwrap_or_default();
            list.insert(random.usize(..=at), element);
        }
        (5..=7, Value::Array(list)) => list.push(other),
        (8..=10, Value::Array(list)) if !list.is_empty() => {
            list.remove(random.usize(..list.len()));
        }
        (2..=5, Value::Object(map)) => {
            map.insert(word(random), other);
        }
        (6..=8, Value::Object(map)) => {
            let keys: Vec<String> = map.keys().cloned().collect();
            if let Some(key) = random.choice(keys) {
                map.remove(&key);
            }
        }
        (_, Value::String(text)) => *text = edited(text, random, bytewise),
        (_, Value::Bool(flag)) => *flag = !*flag,
        (_, node @ (Value::Number(_) | Value::Null)) => {
            *node = match node.as_i64() {
                Some(n) if random.bool() => json!(n.wrapping_add(random.i64(-2..3))),
                _ => number(random),
            };
        }
        (_, node) => {
            // A folder without a use of its own: one of its children.
            let inner = count(node);
            if let Some(child) = nth_mut(node, &mut random.usize(..inner)) {
                *child = if random.bool() { other } else { scalar(random) };
            }
        }
    }
}

fn edited(text: &str, random: &mut Rng, bytewise: Bytewise) -> String {
    if random.u8(..4) == 0 {
        return word(random);
    }
    let most = text.len() + 16;
    let mut buffer = text.as_bytes().to_vec();
    buffer.resize(most, 0);
    let length = bytewise(&mut buffer, text.len(), most);
    String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned()
}

fn word(random: &mut Rng) -> String {
    random.choice(WORDS).unwrap_or_default().to_owned()
}

fn scalar(random: &mut Rng) -> Value {
    match random.u8(..8) {
        0 => Value::Null,
        1 => json!(random.bool()),
        2 | 3 => number(random),
        4 => json!([]),
        5 => json!({}),
        _ => json!(word(random)),
    }
}

/// A number beside which something may end.
fn number(random: &mut Rng) -> Value {
    match random.u8(..10) {
        0 => json!(u64::MAX),
        1 => json!(i64::MIN),
        2 => json!(-1),
        3..=5 => json!(random.u8(..10)),
        6 => json!(0),
        _ => {
            let edge = 1_i64 << random.u32(..63);
            json!(edge.wrapping_add(random.i64(-2..2)))
        }
    }
}

/// The number of values in a document, itself among them.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum::<usize>(),
        _ => 0,
    }
}

fn nth(value: &Value, at: usize) -> Option<&Value> {
    fn walk<'a>(value: &'a Value, left: &mut usize) -> Option<&'a Value> {
        if *left == 0 {
            return Some(value);
        }
        *left -= 1;
        match value {
            Value::Array(list) => list.iter().find_map(|v| walk(v, left)),
            Value::Object(map) => map.values().find_map(|v| walk(v, left)),
            _ => None,
        }
    }
    walk(value, &mut { at })
}

fn nth_mut<'a>(value: &'a mut Value, left: &mut usize) -> Option<&'a mut Value> {
    if *left == 0 {
        return Some(value);
    }
    *left -= 1;
    match value {
        Value::Array(list) => list.iter_mut().find_map(|v| nth_mut(v, left)),
        Value::Object(map) => map.values_mut().find_map(|v| nth_mut(v, left)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_json_mostly_stays_json_and_changes() {
        let seed = br#"{"claim": {"metadata": {"name": "a", "generation": 3}}, "list": [1, null]}"#;
        let (mut changed, mut kept) = (0, 0);
        for number in 0..2000 {
            let mut data = seed.to_vec();
            data.resize(4096, 0);
            let flip = |data: &mut [u8], size: usize, _: usize| {
                data.iter_mut().take(1).for_each(|b| *b ^= 1);
                size
            };
            let Some(size) = mutate(&mut data, seed.len(), 4096, number, flip) else {
                continue;
            };
            let after: Value = serde_json::from_slice(&data[..size]).unwrap();
            kept += 1;
            changed += u32::from(after != serde_json::from_slice::<Value>(seed).unwrap());
        }
        assert!(kept > 1800 && changed > 1500, "{kept} {changed}");
        assert_eq!(mutate(&mut [b'{'; 9], 9, 9, 7, |_, n, _| n), None);
    }
}
