builtin.module {
  kv.policy @streaming_compact digest "5e064c9d8b0284b8" {
    kv.positions "compact" loc("library/streaming_compact.kvp":3:5)
    %0 = kv.const "4" : !kv.expr<""> loc("library/streaming.kvp":3:15)
    %1 = kv.count "n_sink" %0 loc("library/streaming.kvp":3:15)
    %2 = kv.region "sink" count %1 loc("library/streaming.kvp":3:10)
    %3 = kv.const "1020" : !kv.expr<""> loc("library/streaming.kvp":3:32)
    %4 = kv.count "window" %3 loc("library/streaming.kvp":3:32)
    %5 = kv.region "recent" count %4 loc("library/streaming.kvp":3:25)
    %6 = kv.union %2, %5 loc("library/streaming.kvp":3:10)
    kv.class @all loc("library/streaming.kvp":3:5)
    kv.keep %6 for @all at [#kv.trigger<"chunk", 0, "">, #kv.trigger<"step", 0, "">] loc("library/streaming.kvp":3:5)
  } loc("library/streaming_compact.kvp":2:1)
} loc(unknown)
