//! Identify on a stream of its own, so that all that the peer says is seen, not what the library made of it.

use futures::AsyncReadExt as _;
use libp2p::core::{PeerRecord, SignedEnvelope};
use libp2p::identify::PROTOCOL_NAME;
use libp2p::{Multiaddr, PeerId};
use libp2p_stream::Control;
use serde_json::{Value, json};

const MOST: usize = 64 * 1024;

/// What the peer says of itself.
pub async fn identify(mut control: Control, peer: PeerId) -> Result<Value, String> {
    let stream = control
        .open_stream(peer, PROTOCOL_NAME)
        .await
        .map_err(|error| error.to_string())?;
    let mut content = Vec::new();
    stream
        .take(MOST as u64)
        .read_to_end(&mut content)
        .await
        .map_err(|error| error.to_string())?;
    let (mut protocols, mut addresses) = (Vec::new(), Vec::new());
    let mut answer = json!({"observed": "", "record": "absent"});
    let mut rest = &content[..];
    while !rest.is_empty() {
        // The message may come in several parts that are to be merged.
        let part = delimited(&mut rest)?;
        for (number, value) in fields(part)? {
            match number {
                2 => addresses.push(address(value)?),
                3 => protocols.push(text(value)?),
                4 => answer["observed"] = json!(address(value)?),
                5 => answer["protocol_version"] = json!(text(value)?),
                6 => answer["agent"] = json!(text(value)?),
                8 => check_record(value, peer, &mut answer)?,
                _ => {}
            }
        }
    }
    answer["protocols"] = json!(protocols);
    answer["addresses"] = json!(addresses);
    Ok(answer)
}

fn check_record(content: &[u8], peer: PeerId, into: &mut Value) -> Result<(), String> {
    let envelope = SignedEnvelope::from_protobuf_encoding(content).map_err(|error| error.to_string())?;
    let record = PeerRecord::from_signed_envelope_interop(envelope).map_err(|error| error.to_string())?;
    if record.peer_id() != peer {
        return Err(format!("the signed record is not about {peer}"));
    }
    into["record"] = json!("verified");
    into["record_addresses"] = json!(record.addresses().iter().map(ToString::to_string).collect::<Vec<_>>());
    into["record_seq"] = json!(record.seq());
    Ok(())
}

/// The fields of a message that are bytes or text; numbers are left out.
fn fields(mut rest: &[u8]) -> Result<Vec<(u64, &[u8])>, String> {
    let mut found = Vec::new();
    while !rest.is_empty() {
        let key = number(&mut rest)?;
        match key & 7 {
            0 => {
                number(&mut rest)?;
            }
            2 => found.push((key >> 3, delimited(&mut rest)?)),
            other => return Err(format!("a field of the wire type {other}")),
        }
    }
    Ok(found)
}

fn delimited<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], String> {
    let length = number(rest)? as usize;
    let (value, after) = rest.split_at_checked(length).ok_or("the message ends within a field")?;
    *rest = after;
    Ok(value)
}

fn number(rest: &mut &[u8]) -> Result<u64, String> {
    let mut value = 0;
    for (at, byte) in rest.iter().enumerate().take(9) {
        value |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            *rest = &rest[at + 1..];
            return Ok(value);
        }
    }
    Err("the message ends within a number, or the number is too long".to_owned())
}

fn text(value: &[u8]) -> Result<String, String> {
    String::from_utf8(value.to_vec()).map_err(|error| error.to_string())
}

fn address(value: &[u8]) -> Result<String, String> {
    Multiaddr::try_from(value.to_vec())
        .map(|address| address.to_string())
        .map_err(|error| error.to_string())
}
