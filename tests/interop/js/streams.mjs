// What goes over streams: the content, the client's exchanges and the protocols that this peer serves.
import { createHash } from 'node:crypto'

// Pseudo-random bytes with a prime period, so that lost, repeated or swapped blocks change the hash. Every
// implementation in this directory makes the same.
const PERIOD = 524287
const BLOCK = 64 * 1024
const HEAD = 1024
const QUEUE = 1024 * 1024

const pattern = (() => {
  const content = new Uint8Array(PERIOD + BLOCK)
  let state = 2463534242
  for (let i = 0; i < PERIOD; i++) {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    content[i] = state >>> 24
  }
  content.copyWithin(PERIOD, 0, BLOCK)
  return content
})()

class Gate {
  #resolvers = Promise.withResolvers()
  get opened () { return this.#resolvers.promise }
  open () { this.#resolvers.resolve() }
}

// Bytes counted while they move; "release" opens the gate.
export function newProgress () {
  return { sent: 0, received: 0, gate: new Gate() }
}

// Resolves when all that was given to the stream has left it; rejects when the stream ends first.
function queueEmpty (stream) {
  return new Promise((resolve, reject) => {
    if (stream.writeStatus === 'closed') {
      reject(new Error('the stream is over'))
      return
    }
    const over = () => {
      stream.removeEventListener('idle', idle)
      stream.removeEventListener('close', close)
    }
    const idle = () => { over(); resolve() }
    const close = ({ error }) => { over(); reject(error ?? new Error('the connection ended before the stream did')) }
    stream.addEventListener('idle', idle)
    stream.addEventListener('close', close)
  })
}

async function sendContent (stream, size, seed, digest, onSent) {
  const start = (seed * 7919) % PERIOD
  for (let at = 0; at < size;) {
    const from = (start + at) % PERIOD
    const block = pattern.subarray(from, from + Math.min(BLOCK, size - at))
    digest.update(block)
    if (!stream.send(block)) {
      await stream.onDrain()
    }
    // 'drain' comes with every window update, however small, so the queue is looked at as well.
    if (stream.writeBufferLength > QUEUE) {
      await queueEmpty(stream)
    }
    at += block.byteLength
    onSent(block.byteLength)
  }
}

// A stream that was over when it was handed out.
class EndedEarlyError extends Error {
  constructor (status) {
    super(`the stream was ${status} while it was opened`)
    this.name = status === 'reset' ? 'StreamResetError' : 'EndedEarlyError'
  }
}

// Collects what arrives on a stream from the moment it is made: js-libp2p delivers by events.
class Receiver {
  received = 0
  head = Buffer.alloc(0)
  #digest = createHash('sha256')
  #done = Promise.withResolvers()
  #enough = Promise.withResolvers()
  #line = Promise.withResolvers()

  constructor (stream, { limit = 0, held = false, onData = () => {} } = {}) {
    this.#done.promise.catch(() => {}) // whoever waits for it gets it again
    this.#enough.promise.catch(() => {})
    this.#line.promise.catch(() => {})
    if (held && stream.readStatus === 'readable') {
      stream.pause()
    }
    stream.addEventListener('message', ({ data }) => {
      for (const part of data instanceof Uint8Array ? [data] : data) {
        const left = limit > 0 ? Math.min(part.byteLength, limit - this.received) : part.byteLength
        const block = part.subarray(0, left)
        this.#digest.update(block)
        if (this.head.byteLength < HEAD) {
          this.head = Buffer.concat([this.head, block.subarray(0, HEAD - this.head.byteLength)])
          if (this.head.includes(10)) {
            this.#line.resolve()
          }
        }
        this.received += left
        onData(block)
      }
      if (limit > 0 && this.received >= limit) {
        this.#enough.resolve()
      }
    })
    // 'end' alone says only that no more will come, which is so after a reset too; the other side has finished
    // cleanly if it has closed its direction, of which there is an event, or a status where it has done so before.
    let remoteFinished = stream.remoteWriteStatus === 'closed' && ['open', 'closing'].includes(stream.status)
    const onEnd = () => {
      if (remoteFinished && !['reset', 'aborted'].includes(stream.status)) {
        this.#finish()
      }
    }
    stream.addEventListener('remoteCloseWrite', () => { remoteFinished = true })
    stream.addEventListener('end', onEnd)
    stream.addEventListener('close', ({ error }) => {
      onEnd()
      this.#fail(error ?? new Error('the connection ended before the stream did'))
    })
    if (stream.readableEnded) {
      onEnd()
    }
    // Between the negotiation of a stream and its delivery js-libp2p keeps it for some turns of its own. What ends the
    // stream in that time has had its 'close' event before anybody could listen: only the status tells of it.
    if (['reset', 'aborted'].includes(stream.status)) {
      this.#fail(new EndedEarlyError(stream.status))
    } else if (stream.status === 'closed') {
      const onRest = () => this.#fail(new EndedEarlyError(stream.status))
      stream.readableEnded ? onRest() : stream.addEventListener('end', onRest)
    }
  }

  #finish () {
    this.#done.resolve()
    this.#enough.resolve()
    this.#line.reject(new Error('the stream ended within the first line'))
  }

  #fail (error) {
    this.#done.reject(error)
    this.#enough.reject(error)
    this.#line.reject(error)
  }

  // When the other side has finished; rejects when the stream is reset.
  get end () { return this.#done.promise }
  // When `limit` bytes are there.
  get enough () { return this.#enough.promise }
  // The first line without its end.
  async line () {
    await this.#line.promise
    return this.head.subarray(0, this.head.indexOf(10)).toString()
  }

  get sha256 () { return this.#digest.copy().digest('hex') }
}

function outcome (error) {
  if (error == null) {
    return { reset: false }
  }
  return {
    // js-libp2p does not say with which code a yamux stream was reset
    reset: error.name === 'StreamResetError',
    error: `${error.name}: ${error.message}`
  }
}

function prepare (stream) {
  stream.inactivityTimeout = 600_000
  // A paused stream gets what its window still allows, which may be more than the buffer that js-libp2p gives it.
  stream.maxReadBufferLength = 32 * 1024 * 1024
}

// Opens a stream, sends and reads at the same time, and reports both sides of it.
export async function exchange (connection, options, progress, signal) {
  const started = performance.now()
  let stream
  try {
    stream = await connection.newStream(options.protocol, { signal, maxOutboundStreams: 1024, runOnLimitedConnection: true })
  } catch (error) {
    return { opened: false, ...outcome(error) }
  }
  prepare(stream)
  const abort = () => stream.abort(new Error('the command timed out'))
  const timedOut = new Promise((resolve, reject) => {
    signal.addEventListener('abort', () => { abort(); reject(new Error('the command timed out')) }, { once: true })
  })
  timedOut.catch(() => {}) // whoever races against it gets it again
  const sentDigest = createHash('sha256')
  let sent = 0
  const onSent = count => { sent += count; progress.sent += count }
  const receiver = new Receiver(stream, {
    limit: options.read_at_most,
    held: options.hold,
    onData: block => { progress.received += block.byteLength }
  })
  if (options.hold) {
    progress.gate.opened.then(() => stream.resume()).catch(() => {}) // it has ended meanwhile: `end` tells
  }
  const sending = async () => {
    if (options.text) {
      stream.send(Buffer.from(options.text))
    }
    await sendContent(stream, options.send ?? 0, options.seed ?? 0, sentDigest, onSent)
    if (options.reset_after) {
      stream.abort(new Error('reset on command'))
    } else if (!options.keep_open && !options.after) {
      await stream.close({ signal })
    }
  }
  const reading = async () => {
    if (options.read_at_most > 0) {
      await receiver.enough
      stream.abort(new Error('enough'))
    } else {
      await receiver.end
    }
  }
  const [writeResult, readResult] = await Promise.allSettled([
    Promise.race([sending(), timedOut]), Promise.race([reading(), timedOut])
  ])
  let failure = readResult.reason ?? writeResult.reason
  if (failure == null && options.after > 0) {
    try {
      await sendContent(stream, options.after, options.seed ?? 0, sentDigest, onSent)
    } catch (error) {
      failure = error
    }
  }
  if (failure == null) {
    await stream.close({ signal })
  } else {
    stream.abort(failure)
  }
  return {
    opened: true,
    ...outcome(failure),
    sent,
    sent_sha256: sentDigest.digest('hex'),
    received: receiver.received,
    received_sha256: receiver.sha256,
    head: receiver.head.toString('base64'),
    seconds: (performance.now() - started) / 1000
  }
}

const behaviours = {
  // Returns what it gets, and finishes when the other side has.
  async echo (stream, service, report) {
    const receiver = new Receiver(stream, {
      onData: block => {
        if (stream.writeStatus !== 'writable') {
          return // it was reset while this was buffered: `end` tells
        }
        report.sent += block.byteLength
        if (!stream.send(block)) {
          stream.pause()
          stream.onDrain().then(() => stream.resume()).catch(() => {}) // the stream has ended meanwhile: `end` tells
        }
      }
    })
    report.of(receiver)
    await receiver.end
    await stream.close()
  },

  // Reads to the end and answers with count and hash.
  async sink (stream, service, report, held = false) {
    const receiver = new Receiver(stream, { held })
    report.of(receiver)
    if (held) {
      await service.gate.opened
      stream.resume()
    }
    await receiver.end
    stream.send(Buffer.from(JSON.stringify({ received: receiver.received, sha256: receiver.sha256 })))
    await stream.close()
  },

  // A sink that does not read before it is released.
  async hold (stream, service, report) {
    await behaviours.sink(stream, service, report, true)
  },

  // Reads a line "SIZE SEED", sends that, half-closes, and then reads to the end.
  async source (stream, service, report) {
    const receiver = new Receiver(stream)
    report.of(receiver)
    const [size, seed] = (await receiver.line()).split(' ').map(Number)
    report.skip = receiver.head.indexOf(10) + 1
    await sendContent(stream, size, seed, createHash('sha256'), count => { report.sent += count })
    await stream.close()
    await receiver.end
  },

  // Reads `bytes` bytes and then resets the stream.
  async reset (stream, service, report) {
    const receiver = new Receiver(stream, { limit: service.bytes })
    report.of(receiver)
    await receiver.enough
    stream.abort(new Error('reset on command'))
  },

  // Reads, and never says a word, nor finishes.
  async silent (stream, service, report) {
    const receiver = new Receiver(stream)
    report.of(receiver)
    await receiver.end
    await service.gate.opened
  }
}

// Serves a protocol; what became of each stream is kept in the result.
export async function serve (node, protocol, behaviour, { bytes = 0, code = 0 }) {
  const handler = behaviours[behaviour]
  if (handler == null) {
    throw new Error(`no such behaviour: ${behaviour}`)
  }
  const service = { opened: 0, finished: [], bytes, code, gate: new Gate() }
  await node.unhandle(protocol)
  await node.handle(protocol, async stream => {
    let receiver
    const report = { sent: 0, skip: 0, of: made => { receiver = made } }
    service.opened++
    prepare(stream)
    let failure
    try {
      await handler(stream, service, report)
    } catch (error) {
      failure = error
      stream.abort(error)
    }
    const received = (receiver?.received ?? 0) - report.skip
    service.finished.push({ received, sha256: receiver?.sha256, sent: report.sent, ...outcome(failure) })
  }, { maxInboundStreams: 1024, maxOutboundStreams: 1024, runOnLimitedConnection: true })
  return service
}
