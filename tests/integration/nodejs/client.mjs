// A potluck client written from docs/protocol.md alone, against a running cluster over MQTT 3.1.1 or 5: packs a data set, pushes
// a model, trains and evaluates it, deploys what was trained, infers in msgpack, in JSON and over HTTP, and provokes errors.
// Arguments: broker's URL, cluster, MQTT version (4 or 5), a compiled .keras file (4 inputs, 3 classes), a name for what is made
// here. Prints what it saw as one JSON object.
import mqtt from 'mqtt'
import { decode, encode } from '@msgpack/msgpack'
import { createHash, randomUUID } from 'node:crypto'
import { readFile } from 'node:fs/promises'

const [url, cluster, protocolVersion, modelFile, name] = process.argv.slice(2)
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

function within(promise, what, seconds = 10) {
  let timer
  const late = new Promise((_, reject) => { timer = setTimeout(() => reject(new Error(`no ${what}`)), seconds * 1000) })
  return Promise.race([promise, late]).finally(() => clearTimeout(timer))
}

async function first(topic, wanted, seconds) {
  const found = new Promise((resolve) => heard.set(topic, (message) => wanted(message) && resolve(message)))
  await client.subscribeAsync(topic, { qos: 1 })
  return within(found, `message on ${topic}`, seconds)
}

async function ask(topic, question, encoded = encode, id = randomUUID()) {
  const answer = new Promise((resolve) => waiting.set(id, resolve))
  await client.publishAsync(`${root}/${topic}`, encoded({ ...question, id, reply_to: inbox }), { qos: 1 })
  return within(answer, `answer to ${question.type}`)
}

const told = (message) => (message.type === 'RequestFailed' ? `${message.error.code}: ${message.error.message}` : message.type)

async function askFor(type, topic, question, encoded, id) {
  const message = await ask(topic, question, encoded, id)
  if (message.type !== type) throw new Error(`${question.type} was answered with ${told(message)}`)
  return message
}

// A job's states as they came, and its end.
async function follow(jobId) {
  const states = []
  await client.subscribeAsync(`${root}/jobs/${jobId}/status`, { qos: 1 })
  heard.set(`${root}/jobs/${jobId}/status`, (message) => states.push(message.state))
  const ended = await first(`${root}/jobs/${jobId}/result`, () => true, 120)
  if (ended.state !== 'succeeded') throw new Error(`job ${jobId} ${ended.state}: ${ended.error?.message}`)
  return { states, ended }
}

async function run(job, encoded) {
  const { job_id: jobId } = await askFor('JobAccepted', 'jobs/submit', { type: 'SubmitJob', job }, encoded)
  return follow(jobId)
}

const saw = {}
const [http] = (await first(`${root}/coordinator/status`, (message) => message.state === 'online')).http
const { nodes } = await askFor('NodesListed', 'coordinator/inbox', { type: 'ListNodes' }, JSON.stringify)
saw.nodes = nodes.map((node) => `${node.node_id} ${node.state}`)

// --- blobs: the model, and a data set packed here

async function put(bytes) {
  const sha256 = createHash('sha256').update(bytes).digest('hex')
  const response = await fetch(`${http}/blobs/${sha256}`, { method: 'PUT', body: bytes })
  if (!response.ok) throw new Error(`PUT answered ${response.status}`)
  return { sha256, size: bytes.length }
}

const model = await put(await readFile(modelFile))
const part = await fetch(`${http}/blobs/${model.sha256}`, { headers: { Range: 'bytes=0-1' } })
saw.range = `${part.status} ${await part.text()}` // a .keras file is a zip

// A safetensors file: the length of the header as a 64-bit integer, the header as JSON, and the tensors.
function safetensors(x, y, count) {
  const header = Buffer.from(JSON.stringify({
    x: { dtype: 'F32', shape: [count, 4], data_offsets: [0, x.byteLength] },
    y: { dtype: 'I64', shape: [count], data_offsets: [x.byteLength, x.byteLength + y.byteLength] },
  }))
  const length = Buffer.alloc(8)
  length.writeBigUInt64LE(BigInt(header.length))
  return Buffer.concat([length, header, Buffer.from(x.buffer), Buffer.from(y.buffer)])
}

const count = 300
const labels = Array.from({ length: count }, (_, row) => row % 3)
const rows = labels.flatMap((label) => [0, 1, 2, 3].map((column) => (column === label ? 3 : 0) + Math.random()))
const shard = await put(safetensors(new Float32Array(rows), new BigInt64Array(labels.map(BigInt)), count))
const classes = ['setosa', 'versicolor', 'virginica']
const format = { kind: 'arrays', inputs: ['x'], target: 'y', classes }
const manifest = await put(encode({ name, count, format, shards: [{ blob: shard, count }] }))
saw.dataset = (await askFor('DatasetAdded', 'coordinator/inbox', { type: 'AddDataset', name, manifest })).dataset

// --- jobs

const submission = randomUUID()
const training = { kind: 'train', model, dataset: name, epochs: 4, batch_size: 16, register: name }
const submit = (job) => ask('jobs/submit', { type: 'SubmitJob', job }, encode, submission)
const { job_id: jobId } = await submit(training)
saw.again = (await submit(training)).job_id === jobId
saw.other = told(await submit({ ...training, epochs: 5 }))
const trained = await follow(jobId)
saw.states = trained.states
saw.trained = { registered: trained.ended.registered, epochs: trained.ended.history.length }
const evaluated = await run({ kind: 'evaluate', model: name, dataset: name }, JSON.stringify)
saw.evaluation = { count: evaluated.ended.evaluation.count, accuracy: evaluated.ended.evaluation.metrics.accuracy }
saw.deployed = (await run({ kind: 'deploy', model: name, replicas: 1 })).ended.deployment

// --- inference

const floats = (data) => [...new Float32Array(data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength))]
const row = new Float32Array([0.5, 3.5, 0.25, 0.75])
const tensor = { name: 'x', datatype: 'FP32', shape: [1, 4] }
const infer = `models/${name}/infer`
const packed = { type: 'Infer', inputs: [{ ...tensor, data: new Uint8Array(row.buffer) }] }
const listed = { type: 'Infer', inputs: [{ ...tensor, data: [...row] }] }
const binary = await askFor('Inferred', infer, packed)
const text = await askFor('Inferred', infer, listed, JSON.stringify)
saw.binary = floats(binary.outputs[0].data)
saw.text = text.outputs[0].data
saw.encodings = [binary.encoding, text.encoding]

const described = await (await fetch(`${http}/v2/models/${name}`)).json()
const question = JSON.stringify({
  inputs: [{ ...tensor, name: described.inputs[0].name, parameters: { binary_data_size: row.byteLength } }], parameters: { binary_data_output: true },
})
const response = await fetch(`${http}/v2/models/${name}/infer`, {
  method: 'POST',
  headers: { 'Inference-Header-Content-Length': String(Buffer.byteLength(question)) },
  body: Buffer.concat([Buffer.from(question), Buffer.from(row.buffer)]),
})
const body = Buffer.from(await response.arrayBuffer())
saw.http = floats(body.subarray(Number(response.headers.get('Inference-Header-Content-Length'))))

// --- what is wrong is refused

saw.errors = []
for (const [topic, question] of [
  ['coordinator/inbox', { type: 'GetJob', job_id: 'nothing' }],
  ['coordinator/inbox', { type: 'Nonsense' }],
  ['coordinator/inbox', { type: 'GetJob', job_id: 5 }],
  ['coordinator/inbox', { type: 'RegisterModel', name, model: { ...model, size: model.size + 1 } }],
  ['jobs/submit', { type: 'SubmitJob', job: { kind: 'deploy', model: `not-${name}` } }],
  [infer, { type: 'Infer', inputs: [{ ...tensor, shape: [1, 3], data: [1, 2, 3] }] }],
  ['models/nothing/infer', listed],
]) {
  for (const encoded of [JSON.stringify, encode]) {
    const failed = await ask(topic, question, encoded)
    saw.errors.push(`${question.type} ${failed.encoding} ${failed.error?.code}`)
  }
}
saw.undeployed = (await askFor('Undeployed', 'coordinator/inbox', { type: 'Undeploy', model: name })).deployments

await client.endAsync()
console.log(JSON.stringify(saw))
