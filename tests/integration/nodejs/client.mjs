// A potluck client written from docs/protocol.md alone: pushes a model, registers it, submits a job, follows it to its end,
// infers in msgpack and in JSON over MQTT 3.1.1 or 5, and provokes errors. Prints what it saw as one JSON object.
import mqtt from 'mqtt'
import { decode, encode } from '@msgpack/msgpack'
import { createHash, randomUUID } from 'node:crypto'

const [url, cluster, protocolVersion] = process.argv.slice(2)
const root = `potluck/v1/${cluster}`
const inbox = `${root}/clients/js-${randomUUID()}/inbox`
const waiting = new Map()
const heard = new Map()

const client = await mqtt.connectAsync(url, { protocolVersion: Number(protocolVersion) })
client.on('message', (topic, payload) => {
  const message = payload[0] === 0x7b ? JSON.parse(payload) : decode(payload)
  message.encoding = payload[0] === 0x7b ? 'json' : 'msgpack'
  if (topic === inbox) waiting.get(message.id)?.(message)
  else heard.get(topic)?.(message)
})
await client.subscribeAsync(inbox, { qos: 1 })

function within(promise, what) {
  let timer
  const late = new Promise((_, reject) => { timer = setTimeout(() => reject(new Error(`no ${what}`)), 10_000) })
  return Promise.race([promise, late]).finally(() => clearTimeout(timer))
}

async function first(topic, wanted) {
  const found = new Promise((resolve) => heard.set(topic, (message) => wanted(message) && resolve(message)))
  await client.subscribeAsync(topic, { qos: 1 })
  return within(found, `message on ${topic}`)
}

async function ask(topic, question, encoded = encode) {
  const id = randomUUID()
  const answer = new Promise((resolve) => waiting.set(id, resolve))
  await client.publishAsync(`${root}/${topic}`, encoded({ ...question, id, reply_to: inbox }), { qos: 1 })
  return within(answer, `answer to ${question.type}`)
}

const saw = {}
const status = await first(`${root}/coordinator/status`, (message) => message.state === 'online')

const model = Buffer.from('a model file')
const sha256 = createHash('sha256').update(model).digest('hex')
const put = await fetch(`${status.http[0]}/blobs/${sha256}`, { method: 'PUT', body: model })
saw.put = put.status
const got = await fetch(`${status.http[0]}/blobs/${sha256}`, { headers: { Range: 'bytes=2-6' } })
saw.range = await got.text()

const reference = { sha256, size: model.length }
saw.registered = (await ask('coordinator/inbox', { type: 'RegisterModel', name: 'js', model: reference })).model.version
saw.nodes = (await ask('coordinator/inbox', { type: 'ListNodes' }, JSON.stringify)).nodes ?? []

const job = { kind: 'evaluate', model: reference, dataset: 'plants', batch_size: 8 }
const { job_id: jobId } = await ask('jobs/submit', { type: 'SubmitJob', job })
saw.state = (await first(`${root}/jobs/${jobId}/status`, (message) => message.state === 'running')).progress
saw.result = (await first(`${root}/jobs/${jobId}/result`, () => true)).evaluation.metrics

const row = new Float32Array([5.5, -3, 1.25, 0])
const bytes = { name: 'x', datatype: 'FP32', shape: [1, 4], data: new Uint8Array(row.buffer) }
const binary = await ask('models/iris/infer', { type: 'Infer', inputs: [bytes] })
const { data } = binary.outputs[0]
saw.binary = [...new Float32Array(data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength))]
const list = { name: 'x', datatype: 'FP32', shape: [1, 4], data: [...row] }
const text = await ask('models/iris/infer', { type: 'Infer', inputs: [list] }, JSON.stringify)
saw.text = text.outputs[0].data
saw.encodings = [binary.encoding, text.encoding]

saw.errors = []
for (const [topic, question] of [
  ['coordinator/inbox', { type: 'GetJob', job_id: 'nothing' }],
  ['coordinator/inbox', { type: 'Nonsense' }],
  ['coordinator/inbox', { type: 'GetJob', job_id: 5 }],
]) {
  const failed = await ask(topic, question, JSON.stringify)
  saw.errors.push(`${failed.type} ${failed.error.code}`)
}

await client.endAsync()
console.log(JSON.stringify(saw))
