//! What goes over streams: the client's exchanges and the protocols that this peer serves.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, StreamExt as _};
use libp2p::{PeerId, Stream, StreamProtocol};
use libp2p_stream::Control;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use crate::content::blocks;

const HEAD: usize = 1024;

/// Shut until it is opened, once.
pub struct Gate(watch::Sender<bool>);

impl Default for Gate {
    fn default() -> Self {
        Self(watch::channel(false).0)
    }
}

impl Gate {
    pub fn open(&self) {
        self.0.send_replace(true);
    }

    async fn opened(&self) {
        let mut receiver = self.0.subscribe();
        let _ = receiver.wait_for(|open| *open).await;
    }
}

/// Bytes counted while they move; "release" opens the gate.
#[derive(Default)]
pub struct Progress {
    pub sent: AtomicU64,
    pub received: AtomicU64,
    pub gate: Gate,
}

#[derive(Deserialize, Clone, Default)]
#[serde(default)]
pub struct ExchangeOptions {
    text: String,
    send: usize,
    seed: usize,
    after: usize,
    keep_open: bool,
    read_at_most: usize,
    reset_after: bool,
    hold: bool,
}

impl ExchangeOptions {
    /// The same with the seed of the exchange with this number.
    pub fn seeded(&self, number: usize) -> Self {
        Self {
            seed: self.seed + number,
            ..self.clone()
        }
    }
}

/// What was received on a stream.
#[derive(Default)]
struct Received {
    count: usize,
    head: Vec<u8>,
    digest: Sha256,
}

impl Received {
    fn take(&mut self, data: &[u8]) {
        self.count += data.len();
        self.digest.update(data);
        let room = HEAD.saturating_sub(self.head.len()).min(data.len());
        self.head.extend_from_slice(&data[..room]);
    }

    fn sha256(&self) -> String {
        hexadecimal(&self.digest)
    }
}

fn hexadecimal(digest: &Sha256) -> String {
    digest
        .clone()
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Puts an error of a stream into words. rust-libp2p takes a reset for an end when it reads, and neither sends nor
/// reports codes: what it knows is that a direction which is still open cannot be written to any more.
fn outcome(into: &mut Value, result: &io::Result<()>) {
    into["reset"] = json!(false);
    if let Err(error) = result {
        into["reset"] = json!(matches!(
            error.kind(),
            io::ErrorKind::WriteZero | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
        ));
        into["error"] = json!(error.to_string());
    }
}

async fn send_content<W: AsyncWrite + Unpin>(
    to: &mut W,
    size: usize,
    seed: usize,
    digest: &mut Sha256,
    counters: &[&AtomicU64],
) -> io::Result<()> {
    for block in blocks(size, seed) {
        to.write_all(block).await?;
        digest.update(block);
        for counter in counters {
            counter.fetch_add(block.len() as u64, Relaxed);
        }
    }
    to.flush().await
}

/// Reads to the end, or to `limit` bytes if that is not 0.
async fn receive<R: AsyncRead + Unpin>(
    from: &mut R,
    limit: usize,
    into: &mut Received,
    counter: &AtomicU64,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    while limit == 0 || into.count < limit {
        let most = if limit == 0 {
            buffer.len()
        } else {
            buffer.len().min(limit - into.count)
        };
        let count = from.read(&mut buffer[..most]).await?;
        if count == 0 {
            break;
        }
        into.take(&buffer[..count]);
        counter.fetch_add(count as u64, Relaxed);
    }
    Ok(())
}

/// Fails if a stream that was read to its end was in truth reset; our direction must still be open.
async fn check_open<W: AsyncWrite + Unpin>(stream: &mut W) -> io::Result<()> {
    futures::future::poll_fn(|context| std::pin::Pin::new(&mut *stream).poll_write(context, &[]))
        .await
        .map(|_| ())
}

/// Opens a stream, sends and reads at the same time, and reports both sides of it.
pub async fn exchange(
    mut control: Control,
    peer: PeerId,
    name: String,
    o: ExchangeOptions,
    all: Arc<Progress>,
) -> Value {
    let started = Instant::now();
    let protocol = match StreamProtocol::try_from_owned(name) {
        Ok(protocol) => protocol,
        Err(error) => return json!({"opened": false, "reset": false, "error": error.to_string()}),
    };
    let mut stream = match control.open_stream(peer, protocol).await {
        Ok(stream) => stream,
        Err(error) => return json!({"opened": false, "reset": false, "error": error.to_string()}),
    };
    let (sent, mut received, mut sent_digest) = (AtomicU64::new(0), Received::default(), Sha256::new());
    let result = converse(&mut stream, &o, &all, &sent, &mut sent_digest, &mut received).await;
    let mut report = json!({
        "opened": true,
        "sent": sent.load(Relaxed),
        "sent_sha256": hexadecimal(&sent_digest),
        "received": received.count,
        "received_sha256": received.sha256(),
        "head": BASE64.encode(&received.head),
        "seconds": started.elapsed().as_secs_f64(),
    });
    outcome(&mut report, &result);
    report // the stream is dropped, and with it reset if a direction is still open
}

async fn converse(
    stream: &mut Stream,
    o: &ExchangeOptions,
    all: &Progress,
    sent: &AtomicU64,
    sent_digest: &mut Sha256,
    received: &mut Received,
) -> io::Result<()> {
    let waits = o.keep_open || o.after > 0;
    let (mut reader, mut writer) = stream.split();
    let sending = async {
        writer.write_all(o.text.as_bytes()).await?;
        send_content(&mut writer, o.send, o.seed, sent_digest, &[sent, &all.sent]).await?;
        if o.reset_after {
            return Err(io::Error::other("reset on command"));
        }
        if waits || o.read_at_most > 0 {
            return Ok(());
        }
        writer.close().await
    };
    let reading = async {
        if o.hold {
            all.gate.opened().await;
        }
        receive(&mut reader, o.read_at_most, received, &all.received).await
    };
    futures::try_join!(sending, reading)?;
    if o.read_at_most > 0 {
        return Ok(());
    }
    if waits {
        check_open(&mut writer).await?;
        send_content(&mut writer, o.after, o.seed, sent_digest, &[sent, &all.sent]).await?;
        writer.close().await?;
    }
    Ok(())
}

/// A protocol that we serve, and what became of each stream so far.
#[derive(Default)]
pub struct Service {
    behaviour: String,
    bytes: usize,
    opened: AtomicU64,
    finished: Mutex<Vec<Value>>,
    pub gate: Gate,
}

impl Service {
    pub fn report(&self) -> Value {
        json!({"opened": self.opened.load(Relaxed), "finished": *self.finished.lock().unwrap()})
    }
}

/// Serves a protocol until the peer ends, or until it is served anew.
pub fn serve(
    control: &mut Control,
    services: &mut HashMap<String, Arc<Service>>,
    name: String,
    behaviour: String,
    bytes: usize,
) -> Result<(), String> {
    if !["echo", "sink", "hold", "source", "reset", "silent"].contains(&behaviour.as_str()) {
        return Err(format!("no such behaviour: {behaviour}"));
    }
    let protocol = StreamProtocol::try_from_owned(name.clone()).map_err(|error| error.to_string())?;
    let mut incoming = control.accept(protocol).map_err(|error| error.to_string())?;
    let service = Arc::new(Service {
        behaviour,
        bytes,
        ..Service::default()
    });
    services.insert(name, service.clone());
    tokio::spawn(async move {
        while let Some((_, stream)) = incoming.next().await {
            service.opened.fetch_add(1, Relaxed);
            tokio::spawn(serve_stream(service.clone(), stream));
        }
    });
    Ok(())
}

async fn serve_stream(service: Arc<Service>, mut stream: Stream) {
    let (sent, mut received) = (AtomicU64::new(0), Received::default());
    let result = behave(&service, &mut stream, &sent, &mut received).await;
    let mut report = json!({"received": received.count, "sha256": received.sha256(), "sent": sent.load(Relaxed)});
    outcome(&mut report, &result);
    drop(stream); // resets what is not closed
    service.finished.lock().unwrap().push(report);
}

async fn behave(service: &Service, stream: &mut Stream, sent: &AtomicU64, received: &mut Received) -> io::Result<()> {
    let unused = AtomicU64::new(0);
    match service.behaviour.as_str() {
        // Returns what it gets, and finishes when the other side has.
        "echo" => {
            let mut buffer = vec![0; 64 * 1024];
            loop {
                let count = stream.read(&mut buffer).await?;
                if count == 0 {
                    check_open(stream).await?;
                    return stream.close().await;
                }
                received.take(&buffer[..count]);
                stream.write_all(&buffer[..count]).await?;
                stream.flush().await?;
                sent.fetch_add(count as u64, Relaxed);
            }
        }
        // Reads to the end and answers with count and hash; `hold` does not read before it is released.
        "sink" | "hold" => {
            if service.behaviour == "hold" {
                service.gate.opened().await;
            }
            receive(stream, 0, received, &unused).await?;
            check_open(stream).await?;
            let answer = json!({"received": received.count, "sha256": received.sha256()});
            stream.write_all(answer.to_string().as_bytes()).await?;
            stream.close().await
        }
        // Reads a line "SIZE SEED", sends that, half-closes, and then reads to the end.
        "source" => {
            let mut line = Vec::new();
            let mut byte = [0];
            while byte != *b"\n" {
                stream.read_exact(&mut byte).await?;
                line.push(byte[0]);
            }
            let numbers: Vec<usize> = String::from_utf8_lossy(&line)
                .split_whitespace()
                .filter_map(|word| word.parse().ok())
                .collect();
            let [size, seed] = numbers[..] else {
                return Err(io::Error::other("not a line of two numbers"));
            };
            send_content(stream, size, seed, &mut Sha256::new(), &[sent]).await?;
            stream.close().await?;
            receive(stream, 0, received, &unused).await
        }
        // Reads `bytes` bytes and then resets the stream.
        "reset" => {
            receive(stream, service.bytes, received, &unused).await?;
            Err(io::Error::other("reset on command"))
        }
        // Reads, and never says a word, nor finishes.
        _ => {
            receive(stream, 0, received, &unused).await?;
            service.gate.opened().await;
            Ok(())
        }
    }
}

/// Races a future against the deadline of its command.
pub async fn within<T>(seconds: f64, future: impl Future<Output = T>) -> Result<T, String> {
    tokio::time::timeout(std::time::Duration::from_secs_f64(seconds), future)
        .await
        .map_err(|_| "the command timed out".to_owned())
}
