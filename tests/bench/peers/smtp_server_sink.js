// Node's smtp-server, discarding every message: `node smtp_server_sink.js PORT [CERT KEY]`. Found through NODE_PATH in `.bench/`.
// With a certificate the port speaks TLS from the first byte (SMTPS). Reverse DNS is off, as none of the others does one.
"use strict";

const fs = require("fs");
const { SMTPServer } = require("smtp-server");

const [port, cert, key] = process.argv.slice(2);
const server = new SMTPServer({
    authOptional: true,
    disabledCommands: ["STARTTLS"],
    disableReverseLookup: true,
    socketTimeout: 600000, // idle sessions outlast the measurement of their memory
    ...(cert && { secure: true, cert: fs.readFileSync(cert), key: fs.readFileSync(key) }),
    onData(stream, session, callback) {
        stream.on("end", () => callback());
        stream.resume();
    },
});
server.on("error", () => {}); // a connection that closes before its handshake, as the wait for the port does, is one
server.listen(Number(port), "127.0.0.1");
