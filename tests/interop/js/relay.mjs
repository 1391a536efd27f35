// Circuit relay v2: this peer as a relay, and as one that is reached through a relay.
import { circuitRelayServer } from '@libp2p/circuit-relay-v2'
import { peerIdFromString } from '@libp2p/peer-id'
import { multiaddr } from '@multiformats/multiaddr'

const UNLIMITED_SECONDS = 24 * 3600 // a number that setTimeout takes
const UNLIMITED_DATA = 1n << 40n
const MANY = 1000

// Makes this peer a relay for everybody. In limits 0 stands for none, in the other options for the library's own number.
export async function serveRelay (node, { data = 0, seconds = 0, reservations = 0, ttl = 0 }) {
  const server = circuitRelayServer({
    maxInboundHopStreams: MANY,
    maxOutboundStopStreams: MANY,
    reservations: {
      maxReservations: reservations > 0 ? reservations : MANY,
      applyDefaultLimit: data > 0 || seconds > 0,
      defaultDataLimit: data > 0 ? BigInt(data) : UNLIMITED_DATA,
      defaultDurationLimit: (seconds > 0 ? seconds : UNLIMITED_SECONDS) * 1000,
      ...(ttl > 0 ? { reservationTtl: ttl * 1000 } : {})
    }
  })(node.components)
  await server.start()
}

// Listens behind the relay at this address: js-libp2p makes the reservation, and renews it.
export async function reserve (node, address) {
  const manager = node.components.transportManager
  await manager.listen([multiaddr(address).encapsulate('/p2p-circuit')])
  const relay = peerIdFromString(address.slice(address.lastIndexOf('/') + 1))
  const transport = manager.getTransports().find(each => each.reservationStore != null)
  const reservation = transport.reservationStore.getReservation(relay)
  if (reservation == null) {
    throw new Error('the relay gave no reservation')
  }
  const addresses = reservation.addrs.map(each => `${multiaddr(each)}/p2p-circuit/p2p/${node.peerId}`)
  // The limits that come with a reservation are dropped by js-libp2p.
  return { addresses, expire: Number(reservation.expire) }
}

// What a connection is limited to, if it is.
export function describeCircuit (connection) {
  const limits = connection.limits
  return {
    relayed: connection.remoteAddr.toString().includes('/p2p-circuit'),
    limited: limits != null,
    ...(limits == null ? {} : { data: Number(limits.bytes ?? 0), seconds: limits.seconds ?? 0 })
  }
}
