// WebSocket for the peer beside this file: where to listen, with which certificate, and whose certificates to believe.
import { readFileSync } from 'node:fs'
import { webSockets } from '@libp2p/websockets'
import WebSocket from 'ws'

export const webSocketOptions = {
  listen: { type: 'string', default: '/ip4/127.0.0.1/tcp/0' },
  certificate: { type: 'string', default: '' },
  'certificate-key': { type: 'string', default: '' },
  trust: { type: 'string', default: '' }
}

export function webSocketTransport (options) {
  const ca = options.trust === '' ? undefined : readFileSync(options.trust)
  // What js-libp2p dials with; Node 20 has none, and that of later ones cannot be told whom to believe.
  globalThis.WebSocket = class extends WebSocket {
    constructor (uri) {
      super(uri, { ca })
    }
  }
  const https = options.certificate === ''
    ? undefined
    : { cert: readFileSync(options.certificate), key: readFileSync(options['certificate-key']) }
  return webSockets({ https })
}
