//! A libp2p peer for peerup's interop tests, built on rust-libp2p: TCP, Noise and yamux on loopback only.
//!
//! Commands come as lines of JSON on standard input, each with an "id" and a "do"; answers go to standard output as
//! lines of JSON with the same "id", "ok" and, where not ok, "error". The first line out is {"event":"ready",…}.
//! Commands run side by side. The peer ends when standard input does. The commands are described in ../README.md; the
//! peers on go-libp2p and js-libp2p beside this one understand the same.

mod content;
mod identify;
mod node;
mod streams;

use std::collections::HashMap;
use std::io::Write as _;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use futures::{AsyncReadExt as _, AsyncWriteExt as _};
use libp2p::identity::Keypair;
use libp2p::{Multiaddr, PeerId, ping};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncBufReadExt as _;

use identify::identify;
use node::{Answer, Command, Node, RelayOptions};
use streams::{ExchangeOptions, Progress, Service, exchange, serve, within};

const LOCKED: &str = include_str!("../Cargo.lock");

#[derive(Deserialize)]
struct Request {
    id: u64,
    r#do: String,
    #[serde(default)]
    address: String,
    #[serde(default)]
    peer: String,
    #[serde(default)]
    protocol: String,
    #[serde(default)]
    behaviour: String,
    #[serde(default = "default_timeout")]
    timeout: f64,
    #[serde(default)]
    count: usize,
    #[serde(default)]
    of: u64,
    #[serde(default)]
    bytes: usize,
    #[serde(flatten)]
    exchange: ExchangeOptions,
    #[serde(flatten)]
    relay: RelayOptions,
}

fn default_timeout() -> f64 {
    30.0
}

struct Peer {
    node: Node,
    services: Mutex<HashMap<String, Arc<Service>>>,
    running: Mutex<HashMap<u64, Arc<Progress>>>, // by id of the exchange command
}

fn say(value: &Value) {
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{value}").and_then(|()| out.flush()).is_err() {
        std::process::exit(1); // nobody listens any more
    }
}

impl Peer {
    async fn run(self: Arc<Self>, request: Request) {
        let (id, timeout) = (request.id, request.timeout);
        let answer = within(timeout, self.carry_out(request)).await.and_then(|answer| answer);
        let mut answer = answer.unwrap_or_else(|error| json!({"error": error}));
        answer["id"] = json!(id);
        answer["ok"] = json!(answer.get("error").is_none());
        say(&answer);
    }

    async fn carry_out(&self, request: Request) -> Answer {
        match request.r#do.as_str() {
            "dial" => self.node.order(Command::Dial(address(&request)?)).await,
            "disconnect" => self.node.order(Command::Disconnect(peer(&request)?)).await,
            "connections" => self.node.order(Command::Connections).await,
            "wait-closed" => self.wait_closed(peer(&request)?).await,
            "identify" => identify(self.node.control.clone(), peer(&request)?).await,
            "ping" => self.ping(peer(&request)?, request.count.max(1)).await,
            "exchange" => self.exchanges(peer(&request)?, request).await,
            "progress" => {
                let progress = self.progress(request.of)?;
                Ok(json!({"sent": progress.sent.load(Relaxed), "received": progress.received.load(Relaxed)}))
            }
            "serve" => {
                let mut services = self.services.lock().unwrap();
                let mut control = self.node.control.clone();
                serve(
                    &mut control,
                    &mut services,
                    request.protocol,
                    request.behaviour,
                    request.bytes,
                )?;
                Ok(json!({}))
            }
            "served" => Ok(self.service(&request.protocol)?.report()),
            "release" => {
                if request.protocol.is_empty() {
                    self.progress(request.of)?.gate.open();
                } else {
                    self.service(&request.protocol)?.gate.open();
                }
                Ok(json!({}))
            }
            "relay-serve" => self.node.order(Command::RelayServe(request.relay)).await,
            "reserve" => self.node.order(Command::Reserve(address(&request)?)).await,
            other => Err(format!("no such command: {other}")),
        }
    }

    fn service(&self, name: &str) -> Result<Arc<Service>, String> {
        self.services
            .lock()
            .unwrap()
            .get(name)
            .cloned()
            .ok_or_else(|| format!("{name} is not served"))
    }

    fn progress(&self, of: u64) -> Result<Arc<Progress>, String> {
        self.running
            .lock()
            .unwrap()
            .get(&of)
            .cloned()
            .ok_or_else(|| format!("no exchange {of} runs"))
    }

    /// Returns when there is no connection to the peer.
    async fn wait_closed(&self, peer: PeerId) -> Answer {
        let mut known = self.node.known.clone();
        let _ = known.wait_for(|known| !known.connected.contains_key(&peer)).await;
        Ok(json!({}))
    }

    /// On a stream of its own: the library's own pings come when they come.
    async fn ping(&self, peer: PeerId, count: usize) -> Answer {
        let mut control = self.node.control.clone();
        let mut stream = control
            .open_stream(peer, ping::PROTOCOL_NAME)
            .await
            .map_err(|error| error.to_string())?;
        let mut seconds = Vec::new();
        for number in 0..count {
            let sent: [u8; 32] = Sha256::digest(number.to_be_bytes()).into();
            let started = Instant::now();
            stream.write_all(&sent).await.map_err(|error| error.to_string())?;
            stream.flush().await.map_err(|error| error.to_string())?;
            let mut received = [0; 32];
            stream
                .read_exact(&mut received)
                .await
                .map_err(|error| error.to_string())?;
            if received != sent {
                return Err("the answer to a ping was another than its question".to_owned());
            }
            seconds.push(started.elapsed().as_secs_f64());
        }
        stream.close().await.map_err(|error| error.to_string())?;
        Ok(json!({"seconds": seconds}))
    }

    /// Runs `count` exchanges side by side with seeds that follow each other.
    async fn exchanges(&self, peer: PeerId, request: Request) -> Answer {
        let progress = Arc::new(Progress::default());
        self.running.lock().unwrap().insert(request.id, progress.clone());
        let count = request.count.max(1);
        let all = (0..count).map(|number| {
            let options = request.exchange.seeded(number);
            exchange(
                self.node.control.clone(),
                peer,
                request.protocol.clone(),
                options,
                progress.clone(),
            )
        });
        let mut results = futures::future::join_all(all).await;
        if count == 1 {
            return Ok(results.remove(0));
        }
        let failed = results.iter().find_map(|result| result.get("error")).cloned();
        let mut answer = json!({"exchanges": results});
        if let Some(error) = failed {
            answer["error"] = error;
        }
        Ok(answer)
    }
}

fn library() -> String {
    let version = LOCKED
        .split_once("name = \"libp2p\"\nversion = \"")
        .and_then(|(_, rest)| rest.split('"').next());
    format!("rust-libp2p {}", version.unwrap_or("of an unknown version"))
}

fn peer(request: &Request) -> Result<PeerId, String> {
    request
        .peer
        .parse()
        .map_err(|error| format!("{}: {error}", request.peer))
}

fn address(request: &Request) -> Result<Multiaddr, String> {
    request
        .address
        .parse()
        .map_err(|error| format!("{}: {error}", request.address))
}

/// The key, new or made of a text, whether to listen, and whether to send behind a proposal before it is answered.
fn read_options() -> Result<(Keypair, bool, bool), Box<dyn std::error::Error>> {
    let (mut key, mut listen, mut lazy) = (Keypair::generate_ed25519(), true, false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--no-listen" => listen = false,
            "--lazy" => lazy = true,
            "--seed" => {
                let seed = arguments.next().ok_or("--seed needs a text")?;
                key = Keypair::ed25519_from_bytes(Sha256::digest(seed))?;
            }
            _ => return Err("usage: peer [--seed TEXT] [--no-listen] [--lazy]".into()),
        }
    }
    Ok((key, listen, lazy))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (key, listen, lazy) = read_options()?;
    let (node, addresses) = Node::start(key, listen, lazy).await?;
    let whole: Vec<String> = addresses
        .iter()
        .map(|address| format!("{address}/p2p/{}", node.peer))
        .collect();
    say(&json!({"event": "ready", "peer": node.peer.to_string(), "addresses": whole, "library": library()}));
    let peer = Arc::new(Peer {
        node,
        services: Mutex::default(),
        running: Mutex::default(),
    });
    let mut lines = tokio::io::BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        tokio::spawn(peer.clone().run(serde_json::from_str(&line)?));
    }
    std::process::exit(0); // whatever still runs
}
