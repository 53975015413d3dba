builtin.module {
  kv.policy @llmdrop digest "9696ab895220f423" {
    kv.off layers [21, 27] loc("library/llmdrop.kvp":3:5)
    %0 = kv.region "all" loc("library/llmdrop.kvp":2:1)
    %1 = kv.union %0 loc("library/llmdrop.kvp":2:1)
    kv.class @all loc("library/llmdrop.kvp":2:1)
    kv.keep %1 for @all at [] loc("library/llmdrop.kvp":2:1)
  } loc("library/llmdrop.kvp":2:1)
} loc(unknown)
