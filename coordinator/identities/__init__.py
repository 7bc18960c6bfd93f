"""Who belongs to a closed cluster: members and tokens, the CA, the broker's rules, joining and removing. Only closed clusters import it."""
