// A libp2p peer for peerup's interop tests, built on js-libp2p: TCP, Noise and yamux on loopback only.
//
// Commands come as lines of JSON on standard input, each with an "id" and a "do"; answers go to standard output as
// lines of JSON with the same "id", "ok" and, where not ok, "error". The first line out is {"event":"ready",…}. Commands
// run side by side. The peer ends when standard input does. The commands are described in ../README.md; the peer on
// go-libp2p beside this one understands the same.
import './polyfill.mjs'
import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { parseArgs } from 'node:util'
import { circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { generateKeyPair, generateKeyPairFromSeed } from '@libp2p/crypto/keys'
import { identify } from '@libp2p/identify'
import { noise } from '@libp2p/noise'
import { peerIdFromString } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { describeCircuit, reserve, serveRelay } from './relay.mjs'
import { exchange, newProgress, serve } from './streams.mjs'
import { webSocketOptions, webSocketTransport } from './websocket.mjs'

// As programs on js-libp2p say it.
const AGENT = 'js-libp2p/3.3.0 node/24.9.0'
const { values: options } = parseArgs({
  options: {
    key: { type: 'string', default: 'ed25519' },
    seed: { type: 'string', default: '' },
    'no-listen': { type: 'boolean', default: false },
    ...webSocketOptions
  }
})

function makeKey (kind, seed) {
  const name = { ed25519: 'Ed25519', rsa: 'RSA', ecdsa: 'ECDSA', secp256k1: 'secp256k1' }[kind]
  if (name == null) {
    throw new Error(`no such kind of key: ${kind}`)
  }
  if (seed === '') {
    return generateKeyPair(name)
  }
  if (name !== 'Ed25519') {
    throw new Error('only an ed25519 key can be made from a seed')
  }
  return generateKeyPairFromSeed(name, createHash('sha256').update(seed).digest())
}

function say (value) {
  process.stdout.write(JSON.stringify(value) + '\n')
}

const node = await createLibp2p({
  privateKey: await makeKey(options.key, options.seed),
  nodeInfo: { userAgent: AGENT },
  addresses: { listen: options['no-listen'] ? [] : [options.listen] },
  transports: [tcp(), webSocketTransport(options), circuitRelayTransport()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  // The default lets one host connect five times a second; here every peer is on one host.
  connectionManager: { inboundConnectionThreshold: 1000, maxIncomingPendingConnections: 1000 },
  services: { identify: identify({ maxInboundStreams: 8, maxOutboundStreams: 8 }), ping: ping() }
})
const running = new Map() // progress, by id of the exchange command
const services = new Map() // by protocol

function connectionTo (peer) {
  const [connection] = node.getConnections(peerIdFromString(peer))
  if (connection == null) {
    throw new Error(`not connected to ${peer}`)
  }
  return connection
}

function describe (connection) {
  return {
    peer: connection.remotePeer.toString(),
    direction: connection.direction,
    remote: connection.remoteAddr.toString(),
    security: connection.encryption,
    muxer: connection.multiplexer,
    streams: connection.streams.length,
    ...describeCircuit(connection)
  }
}

const commands = {
  async dial ({ address }, signal) {
    const connection = await node.dial(multiaddr(address), { signal, force: true })
    return describe(connection)
  },

  async disconnect ({ peer }, signal) {
    await node.hangUp(peerIdFromString(peer), { signal })
  },

  async connections () {
    return { connections: node.getConnections().map(describe) }
  },

  // Returns when there is no connection to the peer.
  async 'wait-closed' ({ peer }, signal) {
    const id = peerIdFromString(peer)
    const { promise, resolve, reject } = Promise.withResolvers()
    const look = () => { if (node.getConnections(id).length === 0) { resolve() } }
    node.addEventListener('connection:close', look)
    signal.addEventListener('abort', () => reject(new Error('still connected')))
    look()
    await promise.finally(() => node.removeEventListener('connection:close', look))
  },

  async identify ({ peer }, signal) {
    const said = await node.services.identify.identify(connectionTo(peer), { signal })
    const record = said.signedPeerRecord // js-libp2p has verified it, or thrown
    return {
      agent: said.agentVersion,
      protocol_version: said.protocolVersion,
      protocols: said.protocols,
      observed: said.observedAddr?.toString() ?? '',
      addresses: said.listenAddrs.map(String),
      record: record == null ? 'absent' : 'verified',
      record_addresses: record?.addresses.map(String),
      record_seq: record == null ? undefined : Number(record.seq)
    }
  },

  async ping ({ peer, count }, signal) {
    const seconds = []
    for (let i = 0; i < (count ?? 1); i++) {
      seconds.push(await node.services.ping.ping(peerIdFromString(peer), { signal }) / 1000)
    }
    return { seconds }
  },

  async 'relay-serve' (request) {
    await serveRelay(node, request)
  },

  async reserve ({ address }) {
    return await reserve(node, address)
  },

  async exchange (request, signal) {
    const progress = newProgress()
    running.set(request.id, progress)
    const connection = connectionTo(request.peer)
    const one = i => exchange(connection, { ...request, seed: (request.seed ?? 0) + i }, progress, signal)
    const count = request.count ?? 1
    const results = await Promise.all(Array.from({ length: count }, (_, i) => one(i)))
    const failed = results.find(({ error }) => error != null)
    return count === 1 ? results[0] : { exchanges: results, error: failed?.error }
  },

  async progress ({ of }) {
    const { sent, received } = found(running, of, `no exchange ${of} runs`)
    return { sent, received }
  },

  async serve ({ protocol, behaviour, bytes, code }) {
    services.set(protocol, await serve(node, protocol, behaviour, { bytes, code }))
  },

  async release ({ protocol, of }) {
    const held = protocol != null ? found(services, protocol, 'not served') : found(running, of, 'not running')
    held.gate.open()
  },

  async served ({ protocol }) {
    const { opened, finished } = found(services, protocol, `${protocol} is not served`)
    return { opened, finished }
  }
}

function found (map, key, otherwise) {
  if (!map.has(key)) {
    throw new Error(otherwise)
  }
  return map.get(key)
}

async function run (request) {
  const { id } = request
  try {
    const command = found(new Map(Object.entries(commands)), request.do, `no such command: ${request.do}`)
    const result = await command(request, AbortSignal.timeout((request.timeout ?? 30) * 1000))
    const { error, ...rest } = result ?? {}
    say({ ...rest, id, ok: error == null, ...(error == null ? {} : { error }) })
  } catch (error) {
    say({ id, ok: false, error: `${error.name}: ${error.message}` })
  }
}

const { version } = JSON.parse(readFileSync(new URL('node_modules/libp2p/package.json', import.meta.url)))
say({
  event: 'ready',
  peer: node.peerId.toString(),
  addresses: node.getMultiaddrs().map(String),
  library: `js-libp2p ${version}`
})
const lines = createInterface({ input: process.stdin })
lines.on('line', line => { void run(JSON.parse(line)) })
lines.on('close', () => process.exit(0))
