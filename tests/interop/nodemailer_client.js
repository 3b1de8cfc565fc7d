// Sends mail with nodemailer, as the JSON on stdin says, and prints what became of each message as JSON.
// {"transport": nodemailer's options, "token": what it gets for a token that was refused, "mails": [nodemailer's messages]}
"use strict";
const fs = require("fs");
const nodemailer = require("nodemailer");

async function send(transport, mail) {
    try {
        const { accepted, rejected, response } = await transport.sendMail(mail);
        return { accepted, rejected, response };
    } catch ({ code, command, responseCode, response }) {
        return { code, command, responseCode, response };
    }
}

async function main() {
    const { transport: options, token, mails } = JSON.parse(fs.readFileSync(0, "utf8"));
    if (token) options.auth.provisionCallback = (user, renew, done) => done(null, token);
    const transport = nodemailer.createTransport(options);
    const results = await Promise.all(mails.map((mail) => send(transport, mail)));
    transport.close();
    console.log(JSON.stringify(results));
}

main();
