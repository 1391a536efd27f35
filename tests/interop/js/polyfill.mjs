// js-libp2p expects Node 22 or newer; this is the one thing of it that Node 20 lacks.
Promise.withResolvers ??= function withResolvers () {
  const result = {}
  result.promise = new this((resolve, reject) => Object.assign(result, { resolve, reject }))
  return result
}
