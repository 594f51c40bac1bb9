// A charge point made of ocpp-rpc, with its strict mode: both what it sends and what it is sent is checked against the
// schemas. At every connection it boots and reports; it answers commands until it gets SIGTERM.
// Usage: node charge_point.js ENDPOINT IDENTITY. Prints one line for each thing that happens.

const { RPCClient } = require('ocpp-rpc');

const [endpoint, identity] = process.argv.slice(2);
const client = new RPCClient({
    endpoint,
    identity,
    protocols: ['ocpp1.6'],
    strictMode: true,
    callTimeoutMs: 10_000,
    pingIntervalMs: 500,
    backoff: { initialDelay: 100, maxDelay: 1_000, factor: 2, randomisationFactor: 0 },
});

const say = (what, ...details) => console.log(what, ...details.map((detail) => JSON.stringify(detail)));

client.on('strictValidationFailure', ({ method, error }) => say('invalid', method, error.message));
client.on('badMessage', ({ buffer, error }) => say('bad message', buffer.toString(), error.message));
client.on('disconnect', ({ code, reason }) => say('disconnected', code, reason));
client.on('close', ({ code }) => say('closed', code));
client.once('ping', () => say('pong'));

client.handle('Reset', () => ({ status: 'Accepted' }));
client.handle('ChangeConfiguration', ({ params }) => {
    say('configured', params);
    return { status: 'Accepted' };
});
client.handle('GetConfiguration', ({ params }) => ({ configurationKey: [], unknownKey: params.key ?? [] }));

const session = [
    ['BootNotification', { chargePointVendor: 'ACME', chargePointModel: 'Säule' }],
    ['StatusNotification', { connectorId: 0, errorCode: 'NoError', status: 'Available' }],
    ['Authorize', { idTag: '04A2B3' }],
    ['StartTransaction', { connectorId: 1, idTag: '04A2B3', meterStart: 0, timestamp: '2026-11-22T10:00:00Z' }],
    ['DataTransfer', { vendorId: 'com.acme', data: 'x'.repeat(100_000) }],
    ['Heartbeat', {}],
];

client.on('open', async () => {
    say('open', client.protocol);
    try {
        for (const [action, payload] of session) {
            say('answer', action, await client.call(action, payload));
        }
        say('done');
    } catch (error) {
        say('failed', error.message);
    }
});

process.on('SIGTERM', async () => {
    await client.close({ code: 1000, reason: 'switched off' });
    process.exit(0);
});

client.connect().catch((error) => {
    say('not connected', error.message);
    process.exit(1);
});
