// OpenAI's client for Node, unchanged, against Tunesmith. The environment gives URL and TOKEN.
//
//   node client.mjs tune MODEL ROWS      upload, create, poll the events, read the metrics; the last line is JSON
//   node client.mjs chat MODEL QUESTION  the answer, or the error's status and message
import OpenAI from "openai";
import fs from "fs";

const client = new OpenAI({ baseURL: process.env.URL, apiKey: process.env.TOKEN });
const [what, model, given] = process.argv.slice(2);

async function tune() {
  const file = await client.files.create({ file: fs.createReadStream(given), purpose: "fine-tune" });
  let job = await client.fineTuning.jobs.create({ model, training_file: file.id, suffix: "desk", seed: 7 });
  const seen = new Set();
  let ended;
  do {
    await new Promise((done) => setTimeout(done, 500));
    job = await client.fineTuning.jobs.retrieve(job.id);
    ended = ["succeeded", "failed", "cancelled"].includes(job.status); // looked at before its last events are read
    const events = [];
    for await (const event of client.fineTuning.jobs.listEvents(job.id, { limit: 100 })) events.unshift(event);
    for (const event of events.filter((each) => !seen.has(each.id))) {
      seen.add(event.id);
      console.log(event.message);
    }
  } while (!ended);
  if (job.status !== "succeeded") throw new Error(`${job.id} is ${job.status}: ${job.error?.message}`);
  const metrics = await (await client.files.content(job.result_files[0])).text();
  console.log(JSON.stringify({ model: job.fine_tuned_model, metrics }));
}

async function chat() {
  try {
    const answer = await client.chat.completions.create({ model, messages: [{ role: "user", content: given }] });
    console.log(answer.choices[0].message.content);
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    console.log(error.message); // begins with the status
  }
}

await (what === "tune" ? tune() : chat());
