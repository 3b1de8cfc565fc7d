// Node's smtp-server, discarding every message: `node smtp_server_sink.js PORT`. Found through NODE_PATH in `.bench/node`.
// Reverse DNS is off, as none of the others does one.
"use strict";

const { SMTPServer } = require("smtp-server");

const server = new SMTPServer({
    authOptional: true,
    disabledCommands: ["STARTTLS"],
    disableReverseLookup: true,
    onData(stream, session, callback) {
        stream.on("end", () => callback());
        stream.resume();
    },
});
server.listen(Number(process.argv[2]), "127.0.0.1");
