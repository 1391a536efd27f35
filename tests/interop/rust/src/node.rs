//! The swarm: a task of its own that owns it, and a handle through which commands reach it.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::time::Duration;

use futures::StreamExt as _;
use libp2p::core::{ConnectedPoint, upgrade};
use libp2p::core::transport::ListenerId;
use libp2p::identity::Keypair;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, NetworkBehaviour, SwarmEvent};
use libp2p::{Multiaddr, PeerId, Swarm, SwarmBuilder, identify, noise, ping, relay, tcp, yamux};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};

/// As programs on rust-libp2p say it.
const AGENT: &str = "rust-libp2p/0.57.0";
const LONG: Duration = Duration::from_secs(24 * 3600);
const MANY: usize = 1000;

pub type Answer = Result<Value, String>;

#[derive(NetworkBehaviour)]
struct Behaviour {
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    stream: libp2p_stream::Behaviour,
    relay_client: relay::client::Behaviour,
    relay: Toggle<relay::Behaviour>,
}

/// What a relay grants; 0 stands for no limit, or for the library's own number.
#[derive(Deserialize, Default)]
#[serde(default)]
pub struct RelayOptions {
    data: u64,
    seconds: u64,
    reservations: usize,
    ttl: u64,
}

pub enum Command {
    Dial(Multiaddr),
    Disconnect(PeerId),
    Connections,
    RelayServe(RelayOptions),
    Reserve(Multiaddr),
}

type Order = (Command, oneshot::Sender<Answer>);

/// What is known of others, for whoever waits for it to change.
#[derive(Default, Clone)]
pub struct Known {
    pub connected: HashMap<PeerId, usize>,
}

/// Reaches the task that owns the swarm.
#[derive(Clone)]
pub struct Node {
    pub peer: PeerId,
    pub control: libp2p_stream::Control,
    pub known: watch::Receiver<Known>,
    orders: mpsc::UnboundedSender<Order>,
}

impl Node {
    /// Starts a node that may listen on loopback; gives back where.
    pub async fn start(key: Keypair, listen: bool, lazy: bool) -> Result<(Self, Vec<Multiaddr>), Box<dyn std::error::Error>> {
        let peer = key.public().to_peer_id();
        let mut swarm = SwarmBuilder::with_existing_identity(key)
            .with_tokio()
            .with_tcp(
                tcp::Config::default().nodelay(true),
                noise::Config::new,
                yamux::Config::default,
            )?
            .with_relay_client(noise::Config::new, yamux::Config::default)?
            .with_behaviour(|key, relay_client| Behaviour {
                identify: identify::Behaviour::new(
                    identify::Config::new_with_signed_peer_record("ipfs/0.1.0".to_owned(), key)
                        .with_agent_version(AGENT.to_owned())
                        .with_push_listen_addr_updates(true),
                ),
                ping: ping::Behaviour::default(),
                stream: libp2p_stream::Behaviour::new(),
                relay_client,
                relay: Toggle::from(None),
            })?
            .with_swarm_config(|config| {
                let config = config.with_idle_connection_timeout(LONG);
                if lazy {
                    config.with_substream_upgrade_protocol_override(upgrade::Version::V1Lazy)
                } else {
                    config
                }
            })
            .build();
        let mut addresses = Vec::new();
        if listen {
            swarm.listen_on("/ip4/127.0.0.1/tcp/0".parse()?)?;
            while addresses.is_empty() {
                if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
                    addresses.push(address);
                }
            }
        }
        let control = swarm.behaviour().stream.new_control();
        let (orders, incoming) = mpsc::unbounded_channel();
        let (sender, known) = watch::channel(Known::default());
        let owner = Owner {
            swarm,
            known: sender,
            own: addresses.clone(),
            connections: HashMap::new(),
            dials: HashMap::new(),
            reservations: HashMap::new(),
        };
        tokio::spawn(owner.run(incoming));
        Ok((
            Self {
                peer,
                control,
                known,
                orders,
            },
            addresses,
        ))
    }

    pub async fn order(&self, command: Command) -> Answer {
        let (sender, receiver) = oneshot::channel();
        self.orders.send((command, sender)).map_err(|_| "the swarm has ended")?;
        receiver.await.map_err(|_| "the swarm has ended")?
    }
}

struct Owner {
    swarm: Swarm<Behaviour>,
    known: watch::Sender<Known>,
    own: Vec<Multiaddr>,
    connections: HashMap<ConnectionId, (PeerId, ConnectedPoint)>,
    dials: HashMap<ConnectionId, oneshot::Sender<Answer>>,
    reservations: HashMap<ListenerId, (PeerId, oneshot::Sender<Answer>)>,
}

impl Owner {
    async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        loop {
            tokio::select! {
                event = self.swarm.select_next_some() => self.take(event),
                order = orders.recv() => match order {
                    Some((command, answer)) => self.obey(command, answer),
                    None => return,
                },
            }
        }
    }

    fn obey(&mut self, command: Command, answer: oneshot::Sender<Answer>) {
        let said = match command {
            Command::Dial(address) => match self.dial(address) {
                Ok(connection) => {
                    self.dials.insert(connection, answer);
                    return;
                }
                Err(reason) => Err(reason),
            },
            Command::Reserve(address) => match self.reserve(address) {
                Ok((listener, relay)) => {
                    self.reservations.insert(listener, (relay, answer));
                    return;
                }
                Err(reason) => Err(reason),
            },
            Command::Disconnect(peer) => {
                let _ = self.swarm.disconnect_peer_id(peer);
                Ok(json!({}))
            }
            Command::Connections => {
                let list: Vec<Value> = self
                    .connections
                    .values()
                    .map(|(peer, point)| describe(*peer, point))
                    .collect();
                Ok(json!({"connections": list}))
            }
            Command::RelayServe(options) => {
                self.serve_relay(&options);
                Ok(json!({}))
            }
        };
        let _ = answer.send(said);
    }

    fn dial(&mut self, address: Multiaddr) -> Result<ConnectionId, String> {
        let Some(Protocol::P2p(peer)) = address.iter().last() else {
            return Err("the address has no peer id".to_owned());
        };
        let options = DialOpts::peer_id(peer)
            .addresses(vec![address])
            .condition(PeerCondition::Always)
            .build();
        let connection = options.connection_id();
        self.swarm.dial(options).map_err(|error| error.to_string())?;
        Ok(connection)
    }

    fn reserve(&mut self, address: Multiaddr) -> Result<(ListenerId, PeerId), String> {
        let Some(Protocol::P2p(relay)) = address.iter().last() else {
            return Err("the address has no peer id".to_owned());
        };
        let listener = self
            .swarm
            .listen_on(address.with(Protocol::P2pCircuit))
            .map_err(|error| error.to_string())?;
        Ok((listener, relay))
    }

    fn serve_relay(&mut self, o: &RelayOptions) {
        let many = NonZeroU32::new(MANY as u32).expect("not 0");
        let mut config = relay::Config {
            max_reservations: if o.reservations > 0 { o.reservations } else { MANY },
            max_reservations_per_peer: MANY,
            max_circuits: MANY,
            max_circuits_per_peer: MANY,
            max_circuit_duration: if o.seconds > 0 {
                Duration::from_secs(o.seconds)
            } else {
                LONG
            },
            max_circuit_bytes: o.data, // 0 stands for no limit
            reservation_rate_limiters: vec![],
            circuit_src_rate_limiters: vec![],
            ..relay::Config::default()
        }
        .reservation_rate_per_peer(many, Duration::from_secs(1));
        if o.ttl > 0 {
            config.reservation_duration = Duration::from_secs(o.ttl);
        }
        let peer = *self.swarm.local_peer_id();
        self.swarm.behaviour_mut().relay = Toggle::from(Some(relay::Behaviour::new(peer, config)));
        for address in self.own.clone() {
            self.swarm.add_external_address(address); // those that a reservation tells of
        }
    }

    fn take(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint,
                ..
            } => {
                if let Some(answer) = self.dials.remove(&connection_id) {
                    let _ = answer.send(Ok(describe(peer_id, &endpoint)));
                }
                self.connections.insert(connection_id, (peer_id, endpoint));
                self.known
                    .send_modify(|known| *known.connected.entry(peer_id).or_default() += 1);
            }
            SwarmEvent::ConnectionClosed {
                peer_id,
                connection_id,
                num_established,
                ..
            } => {
                self.connections.remove(&connection_id);
                self.known.send_modify(|known| {
                    if num_established == 0 {
                        known.connected.remove(&peer_id);
                    }
                });
            }
            SwarmEvent::OutgoingConnectionError {
                connection_id, error, ..
            } => {
                if let Some(answer) = self.dials.remove(&connection_id) {
                    let _ = answer.send(Err(causes(&error)));
                }
            }
            SwarmEvent::ListenerClosed {
                listener_id, reason, ..
            } => {
                if let Some((_, answer)) = self.reservations.remove(&listener_id) {
                    let _ = answer.send(Err(match reason {
                        Ok(()) => "the relay listener was closed".to_owned(),
                        Err(error) => causes(&error),
                    }));
                }
            }
            SwarmEvent::Behaviour(BehaviourEvent::RelayClient(relay::client::Event::ReservationReqAccepted {
                relay_peer_id,
                limit,
                ..
            })) => self.reserved(
                relay_peer_id,
                limit.map(|limit| (limit.duration(), limit.data_in_bytes())),
            ),
            _ => {}
        }
    }

    fn reserved(&mut self, relay: PeerId, limit: Option<(Option<Duration>, Option<u64>)>) {
        let us = *self.swarm.local_peer_id();
        let behind: Vec<String> = self
            .swarm
            .external_addresses()
            .filter(|address| address.iter().any(|part| part == Protocol::P2p(relay)))
            .map(ToString::to_string)
            .collect();
        let waiting: Vec<ListenerId> = self
            .reservations
            .iter()
            .filter_map(|(listener, (asked, _))| (*asked == relay).then_some(*listener))
            .collect();
        for listener in waiting {
            let Some((_, answer)) = self.reservations.remove(&listener) else {
                continue;
            };
            let mut said = json!({"addresses": behind, "peer": us.to_string()});
            if let Some((duration, data)) = limit {
                said["seconds"] = json!(duration.map_or(0, |duration| duration.as_secs()));
                said["data"] = json!(data.unwrap_or(0));
            }
            let _ = answer.send(Ok(said));
        }
    }
}

fn describe(peer: PeerId, point: &ConnectedPoint) -> Value {
    let remote = match point {
        ConnectedPoint::Dialer { address, .. } => address,
        ConnectedPoint::Listener {
            send_back_addr,
            local_addr,
            ..
        } if send_back_addr.is_empty() => local_addr,
        ConnectedPoint::Listener { send_back_addr, .. } => send_back_addr,
    };
    json!({
        "peer": peer.to_string(),
        "direction": if point.is_dialer() { "outbound" } else { "inbound" },
        "remote": remote.to_string(),
        "security": "/noise", // nothing else is built in
        "muxer": "/yamux/1.0.0",
        "relayed": point.is_relayed(),
    })
}

/// An error with all that caused it: the outermost alone says little.
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut inner = error.source();
    while let Some(cause) = inner {
        text += &format!(": {cause}");
        inner = cause.source();
    }
    text
}
